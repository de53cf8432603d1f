"""A body that cannot be read is refused by what is wrong with it, in the same words everywhere."""

from typing import Any

import httpx
import pytest

from gateway_http.json_errors import wrong_body
from gateway_http.openai_schema import CompletionRequest, decode
from gateway_http.tinker_schema import Sample, parse
from headway.errors import HeadwayError
from headway.reasons import Reason
from tests.gateway import tiny_model


@pytest.mark.parametrize(
    ("body", "message", "field"),
    [
        (b"", "The body is empty.", None),
        (b" \n", "The body is empty.", None),
        (b"{", "The body is not valid JSON: it ends too early.", None),
        (b'{"a": 1,}', "The body is not valid JSON: trailing comma in object (byte 8).", None),
        (b"{'a': 1}", "The body is not valid JSON: object keys must be strings (byte 1).", None),
        (b"\xff", "The body is not valid JSON: invalid character (byte 0).", None),
        (b"[1]", "Expected `object`, got `array`: body.", None),
        (b'{"prompt": 1}', "Expected", "prompt"),
        (b"{}", "is missing", "some"),
    ],
)
@pytest.mark.parametrize(
    "read", [lambda body: decode(CompletionRequest, body), lambda body: parse(body, Sample)]
)
def test_what_is_wrong_is_said(read: Any, body: bytes, message: str, field: str | None) -> None:
    with pytest.raises(HeadwayError) as caught:
        read(body)
    error = caught.value
    assert error.reason is Reason.INVALID_REQUEST
    assert message in error.message
    assert bool(error.field) == bool(field)
    assert field in (error.field, "some", None)


def test_what_is_nested_too_deeply_is_said() -> None:
    assert "deeply" in wrong_body(RecursionError(), b"[").message


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": "x"}),
        ("POST", "/tokenize", {"prompt": "x"}),
        ("POST", "/detokenize", {"tokens": [1]}),
        ("GET", "/v1/models/none", None),
    ],
)
async def test_a_model_that_is_not_there_says_where_the_names_are(
    asgi: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None
) -> None:
    wish = body and {**body, "model": "none"}
    response = await asgi.request(method, path, json=wish)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "GET /v1/models" in error["message"]
    listed = (await asgi.get("/v1/models")).json()["data"]
    assert tiny_model.NAME in [model["id"] for model in listed]
