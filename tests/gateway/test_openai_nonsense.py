"""Bodies and settings that make no sense: a clear refusal, whatever it was."""

from typing import Any

import httpx
import pydantic
import pytest

from gateway_http.settings import GatewaySettings
from tests.gateway import tiny_model
from tests.gateway.scripted import ScriptedScheduler

MODEL = f'"model": "{tiny_model.NAME}"'.encode()
DEEP = b"[" * 100_000 + b"]" * 100_000
OBJECTS = b'{"a":' * 5_000 + b"1" + b"}" * 5_000
USER = b'{"role": "user", "content": "x"}'


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        ("/v1/responses", b'"input": ' + DEEP),
        ("/v1/responses", b'"input": "\\ud800"'),
        (
            "/v1/responses",
            b'"input": "x", "text": {"format": {"type": "json_schema", "schema": ' + DEEP + b"}}",
        ),
        ("/v1/completions", b'"prompt": ' + DEEP),
        ("/v1/completions", b'"prompt": "x", "logprobs": 1e400'),
        ("/v1/completions", b'"prompt": "x", "structured_outputs": {"json": ' + DEEP + b"}"),
        (
            "/v1/completions",
            b'"prompt": "x", "structured_outputs": {"json": "' + b"[" * 60_000 + b'"}',
        ),
        ("/v1/completions", b'"prompt": "x", "structured_outputs": {"json": {"a": "\\ud800"}}'),
        ("/v1/completions", b'"prompt": "x", "logit_bias": {"99999999999999999999": 1}'),
        (
            "/v1/chat/completions",
            b'"messages": [' + USER + b'], "tools": [{"type": "function", '
            b'"function": {"name": "f", "parameters": ' + OBJECTS + b"}}]",
        ),
        (
            "/v1/chat/completions",
            b'"messages": [' + USER + b'], "chat_template_kwargs": {"a": ' + DEEP + b"}",
        ),
        (
            "/v1/chat/completions",
            b'"messages": [{"role": "assistant", "tool_calls": [{"function": '
            b'{"name": "f", "arguments": "' + b"[" * 50_000 + b'"}}]}]',
        ),
        ("/tokenize", b'"messages": ' + DEEP),
        ("/detokenize", b'"tokens": ' + DEEP),
    ],
    ids=lambda value: value[:40].decode() if isinstance(value, bytes) else value,
)
async def test_bodies_that_are_no_request(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler, path: str, rest: bytes
) -> None:
    response = await asgi.post(path, content=b"{" + MODEL + b", " + rest + b"}")
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert scheduler.runs == []


async def test_many_small_values_of_tools_are_bounded(asgi: httpx.AsyncClient) -> None:
    one: Any = {"type": "object", "enum": list(range(15_000))}
    tools = [
        {"type": "function", "function": {"name": f"f{number}", "parameters": one}}
        for number in range(2)
    ]
    body = {
        "model": tiny_model.NAME,
        "messages": [{"role": "user", "content": "x"}],
        "tools": tools,
        "tool_choice": "none",
    }
    response = await asgi.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_formats", "m=xml"),
        ("tool_formats", "hermes"),
        ("reasoning_formats", "m=hermes"),
        ("chat_template_kwargs", "enable_thinking"),
        ("chat_template_kwargs", "a b:bool"),
        ("chat_template_kwargs", "x:object"),
        ("num_text_workers", -1),
        ("text_timeout_s", 0),
        ("max_text_worker_bytes", 0),
        ("max_top_logprobs", 0),
    ],
)
def test_settings_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(pydantic.ValidationError, match=name):
        GatewaySettings(**{name: value})


def test_settings_that_do() -> None:
    settings = GatewaySettings(
        tool_formats="a=b/c=llama3, d=none", chat_template_kwargs="x:str,y:int"
    )
    assert settings.tool_formats == ("a=b/c=llama3", "d=none")
    assert settings.chat_template_kwargs == ("x:str", "y:int")
