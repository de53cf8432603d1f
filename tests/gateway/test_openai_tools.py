"""Tools beside a format, and calls as XML, over a scheduler that says what a test wants."""

import json
from typing import Any

import httpx
import pytest

from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.chats import (
    CLOCK,
    LLAMA_TEMPLATE,
    TEMPLATE,
    USER,
    WEATHER,
    added_up,
    ask,
    events,
    prompt_of,
    refused,
    says,
)
from tests.gateway.resumed import numbered, streamed, way_back
from tests.gateway.scripted import ScriptedScheduler

# In the manner of Qwen3-Coder's.
CODER_TEMPLATE = TEMPLATE.replace("<tool_call></tool_call>", "<tool_call><function=name>")
FORMAT = {"response_format": {"type": "json_object"}}
COUNT: Any = {
    "type": "function",
    "function": {
        "name": "count",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string"}, "most": {"type": "integer"}},
            "required": ["what"],
        },
    },
}
COUNT_CALL = (
    "<tool_call>\n<function=count>\n<parameter=what>\n7 <b>ü</b>\n</parameter>\n"
    "<parameter=most>\n7\n</parameter>\n</function>\n</tool_call>"
)
COUNT_ARGUMENTS = {"what": "7 <b>ü</b>", "most": 7}


def grammar_of(scheduler: ScriptedScheduler) -> generation_pb2.Grammar:
    return scheduler.runs[-1].request.sampling.grammar


async def test_a_reply_is_calls_or_fits_the_format(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.chat_template = TEMPLATE
    scheduler.script = says('{"a": 1}')
    choice = await ask(asgi, tools=[WEATHER], **FORMAT)
    assert choice["message"]["content"] == '{"a": 1}'
    assert prompt_of(scheduler).endswith("<think>\n\n</think>\n\n")
    answer, calls = grammar_of(scheduler).any_of.grammars
    assert answer.json_object
    assert not calls.repetition.HasField("max")
    start, call, end, _ = calls.repetition.grammar.sequence.grammars
    assert (*start.choice.texts, *end.choice.texts) == ("<tool_call>\n", "\n</tool_call>")
    assert json.loads(call.json_schema)["properties"]["name"] == {"const": "weather"}
    scheduler.script = says('<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>')
    choice = await ask(asgi, tools=[WEATHER], parallel_tool_calls=False, **FORMAT)
    assert choice["finish_reason"] == "tool_calls"
    assert grammar_of(scheduler).any_of.grammars[1].repetition.max == 1


async def test_a_call_that_must_come_leaves_nothing_to_the_format(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.chat_template = TEMPLATE
    await ask(asgi, tools=[WEATHER], tool_choice="required", **FORMAT)
    assert grammar_of(scheduler).HasField("json_schema")
    await ask(asgi, tools=[WEATHER], tool_choice="none", **FORMAT)
    assert grammar_of(scheduler).json_object


async def test_llama_3_has_no_marks(asgi: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.chat_template = LLAMA_TEMPLATE
    await ask(asgi, tools=[WEATHER], structured_outputs={"choice": ["yes"]})
    answer, call = grammar_of(scheduler).any_of.grammars
    assert answer.choice.texts == ["yes"]
    assert json.loads(call.json_schema)["required"] == ["name", "parameters"]


async def test_calls_as_xml(asgi: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.chat_template = CODER_TEMPLATE
    scheduler.script = says(f"I count.\n{COUNT_CALL}")
    choice = await ask(asgi, tools=[COUNT, CLOCK])
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == COUNT_ARGUMENTS
    response = await asgi.post(
        "/v1/responses",
        json={
            "model": tiny_model.NAME,
            "input": "Hi",
            "tools": [{"type": "function", **COUNT["function"]}],
        },
    )
    assert json.loads(response.json()["output"][1]["arguments"]) == COUNT_ARGUMENTS


async def test_a_call_as_xml_that_must_come(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.chat_template = CODER_TEMPLATE
    scheduler.script = says(COUNT_CALL.removeprefix("<tool_call>\n"))
    choice = await ask(asgi, tools=[COUNT, CLOCK], tool_choice="required")
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == COUNT_ARGUMENTS
    assert prompt_of(scheduler).endswith("<tool_call>\n")
    assert len(grammar_of(scheduler).any_of.grammars) == 2
    named = {"type": "function", "function": {"name": "count"}}
    await ask(asgi, tools=[COUNT, CLOCK], tool_choice=named)
    start, what, most, _ = grammar_of(scheduler).sequence.grammars
    assert start.choice.texts == ["<function=count>\n"]
    assert what.sequence.grammars[1].sequence.grammars[0].text_until == "</parameter>"
    assert most.repetition.max == 1


async def test_a_stream_of_xml_goes_on_anywhere(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.chat_template = CODER_TEMPLATE
    body = {"model": tiny_model.NAME, "messages": [USER], "stream": True, "tools": [COUNT]}
    response = await streamed(http, scheduler, "/v1/chat/completions", body, COUNT_CALL)
    whole = added_up(events(response.text))
    assert json.loads(whole["tool_calls"][0]["arguments"]) == COUNT_ARGUMENTS
    path, state = way_back(response)
    ids = numbered(response.text)
    assert len(ids) > 5  # a text goes out while it comes
    for event_id, seen in ids:
        rest = await http.get(path, headers={**state, "Last-Event-ID": event_id})
        assert added_up(events(seen + rest.text)) == whole


@pytest.mark.parametrize("name", ["a>b", "a\nb", ""])
async def test_names_that_the_format_cannot_tell(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler, name: str
) -> None:
    scheduler.chat_template = CODER_TEMPLATE
    odd = {"name": "f", "parameters": {"properties": {name: {}}}}
    tools = [{"type": "function", "function": odd}]
    assert await refused(asgi, tools=tools, tool_choice="required") == "tools"
    await ask(asgi, tools=tools)


async def test_very_large_schemas_of_values_are_refused(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.chat_template = CODER_TEMPLATE
    values = {f"v{number}": {"$ref": "#/$defs/t"} for number in range(300)}
    large = {"name": "f", "parameters": {"properties": values, "$defs": {"t": {"type": "null"}}}}
    tools = [{"type": "function", "function": large}]
    assert await refused(asgi, tools=tools, tool_choice="required") == "tools"


@pytest.mark.parametrize("odd", [{"required": 5}, {"properties": {"a": {"enum": "x"}}}])
async def test_schemas_that_say_nothing(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler, odd: dict[str, Any]
) -> None:
    scheduler.chat_template = CODER_TEMPLATE
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    await ask(asgi, tools=tools, tool_choice="required")
