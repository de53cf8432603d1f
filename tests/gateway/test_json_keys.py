"""A body that contradicts itself is refused, at every door, and by the name of the key."""

import json

import httpx
import pytest

from gateway_http.json_keys import check_keys
from headway.errors import HeadwayError
from tests.gateway import tiny_model

LONG = ",".join(map(str, range(1_000)))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"a": 1, "a": 1}',
        '{"b": {"c": [{}, {"a": null, "x": 1, "a": {}}]}}',
        '{"a": 1, "\\u0061": 2}',
        '{"a": [%s], "a": [%s]}' % (LONG, LONG),  # noqa: UP031
        '[[%s], {"a": 1, "b": {"a": 1}, "a": 1}]' % LONG,  # noqa: UP031
    ],
)
def test_a_key_that_stands_twice_is_named(text: str) -> None:
    assert json.loads(text), "valid JSON"
    with pytest.raises(HeadwayError) as caught:
        check_keys(text.encode())
    assert caught.value.field == "a"
    assert "'a'" in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"a": {"a": [{"a": 1}, {"a": 1}]}, "b": "{\\"a\\": 1, \\"a\\": 2}"}',
        '{"a": 1, "A": 1, "": 1, " ": 1}',
        '{"a": %s}' % ("9" * 10_000),
        '{"a": -1e400, "b": [%s], "c": "[%s]"}' % (LONG, LONG),  # noqa: UP031
    ],
)
def test_keys_of_different_objects_may_be_the_same(text: str) -> None:
    check_keys(text.encode())


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", '{"prompt": "a", "max_tokens": 5, "max_tokens": 500', "max_tokens"),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "role": "system"}]', "role"),
        ("/v1/chat/completions", '{"messages": [], "metadata": {"a": 1, "a": 2}', "a"),
        ("/v1/responses", '{"input": "a", "stream": true, "stream": false', "stream"),
        ("/tokenize", '{"prompt": "a", "prompt": "b"', "prompt"),
    ],
)
async def test_the_doors_of_openai(
    asgi: httpx.AsyncClient, path: str, body: str, field: str
) -> None:
    response = await asgi.post(path, content=f'{body}, "model": "{tiny_model.NAME}"}}')
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


async def test_the_door_of_tinker(asgi: httpx.AsyncClient) -> None:
    content = '{"request_id": "a", "request_id": "b"}'
    response = await asgi.post("/api/v1/retrieve_future", content=content)
    assert response.status_code == 400
    assert "request_id" in response.json()["error"]
