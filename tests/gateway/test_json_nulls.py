"""Null is the same as absent, wherever it stands; but what clients write freely keeps its own."""

import json
from typing import Any

import httpx
import pytest

from gateway_http.openai_chat_schema import ChatRequest
from gateway_http.openai_responses_schema import ResponsesRequest
from gateway_http.openai_schema import decode
from headway.errors import HeadwayError
from tests.gateway import tiny_model
from tests.gateway.scripted import ScriptedScheduler

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SCHEMA = {"type": ["object", "null"], "default": None, "const": None, "properties": {"type": None}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}


def read(body: dict[str, Any]) -> ChatRequest:
    return decode(ChatRequest, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("full", "sparse"),
    [
        ({"role": "user", "content": "x", "caller": None, "name": None}, {}),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "namespace": None}], "mood": None},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": None}}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        ),
        ({"role": "user", "content": [{"type": "text", "text": "x", "more": None}]}, {}),
    ],
)
def test_nulls_of_messages(full: dict[str, Any], sparse: dict[str, Any]) -> None:
    sparse = sparse or {name: value for name, value in full.items() if value is not None}
    assert read(chat(messages=[full])) == read(chat(messages=[sparse]))


def test_nulls_of_items() -> None:
    items = [{"type": "function_call", "call_id": "c", "name": "f", "async_": None, "caller": None}]
    body = {"model": "m", "input": [*items, {"role": None, "type": None, "content": "x"}]}
    read_items = decode(ResponsesRequest, json.dumps(body).encode()).input
    assert [one.type for one in read_items if not isinstance(one, str)] == [
        "function_call",
        "message",
    ]


def test_what_is_written_freely_keeps_its_nulls() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "mood": None}}
    tool = {"type": "function", "mood": None, "function": {"name": "f", "parameters": SCHEMA}}
    body = read(chat(response_format=form, tools=[tool], chat_template_kwargs={"x": None}))
    assert body.response_format is not None
    assert body.response_format.json_schema is not None
    assert json.loads(bytes(body.response_format.json_schema.schema)) == SCHEMA
    assert body.tools is not None
    assert body.tools[0].function.parameters == SCHEMA
    assert body.chat_template_kwargs == {"x": None}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (chat(messages=None), "messages"),
        (chat(messages=[{"role": None, "content": "x"}]), "messages[0].role"),
        (chat(messages=[None]), "messages[0]"),
        (
            chat(messages=[{"role": "user", "content": "x", "mood": 1, "x": None}]),
            "messages[0].mood",
        ),
        (chat(response_format={"type": "text", "x": {"a": None}}), "response_format.x"),
        (chat(stop=[None]), "stop[0]"),
        (chat(seed=10**40, user=None, tools=[{"x": None}]), "seed"),
    ],
)
def test_what_is_wrong_besides_is_refused_by_its_name(body: dict[str, Any], field: str) -> None:
    with pytest.raises(HeadwayError) as caught:
        read(body)
    assert caught.value.field == field


async def test_a_call_with_nulls_is_served(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    messages = [{"role": "user", "content": "Hi", "audio": None, "what_comes_next_year": None}]
    body = chat(model=tiny_model.NAME, messages=messages, response_format=None)
    response = await asgi.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
