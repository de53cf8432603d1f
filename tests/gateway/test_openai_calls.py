"""Calls of tools: in bodies and streams, of each format, forced or not."""

import json

import httpx
import pytest

from gateway_http.client import SchedulerClient
from tests.gateway import tiny_model
from tests.gateway.chats import (
    CALL,
    CLOCK,
    LLAMA_TEMPLATE,
    PATH,
    TEMPLATE,
    USER,
    WEATHER,
    added_up,
    ask,
    chat,
    events,
    prompt_of,
    says,
)
from tests.gateway.conftest import serving, settings_for
from tests.gateway.scripted import ScriptedScheduler


@pytest.fixture(autouse=True)
def _template(scheduler: ScriptedScheduler) -> None:
    scheduler.chat_template = TEMPLATE


async def test_a_call_in_a_body(asgi: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.script = says(f"<think>hm</think>\nI look. {CALL}\n{CALL}")
    choice = await ask(asgi, tools=[WEATHER, CLOCK])
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["reasoning_content"], message["content"]) == ("hm", "I look.")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"] * 2
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"place": "Köln"}
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert '"description": "Of a place."' in prompt_of(scheduler)
    one = await ask(asgi, tools=[WEATHER], parallel_tool_calls=False)
    assert len(one["message"]["tool_calls"]) == 1


async def test_a_call_comes_while_it_is_made(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = lambda run: None
    body = chat(stream=True, tools=[WEATHER])
    async with http.stream("POST", PATH, json=body) as response:
        run = await scheduler.run()
        for token_id in tiny_model.encode(f"Let me see.\n{CALL}"):
            run.emit([token_id])
            scheduler.publish()
        run.end(stop_token_id=tiny_model.eos_id())
        run.finish()
        scheduler.publish()
        chunks = events((await response.aread()).decode())
    message = added_up(chunks)
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"].values()
    assert (call["name"], call["arguments"]) == ("weather", '{"place": "Köln"}')
    num_argument_chunks = sum("tool_calls" in c["choices"][0]["delta"] for c in chunks)
    assert num_argument_chunks > 5
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_what_tools_gave_goes_back_into_the_template(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    function = {"name": "weather", "arguments": '{"place": "Bonn"}'}
    messages = [
        USER,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    await ask(asgi, messages=messages, tools=[WEATHER])
    prompt = prompt_of(scheduler)
    told = '<think>hm</think><tool_call>{"name": "weather", "arguments": {"place": "Bonn"}}'
    assert told in prompt
    assert "<|user|>rain<|end|>" in prompt


async def test_a_forced_call_is_begun_and_bound(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says('{"name": "weather", "arguments": {"place": "Ulm"}}')
    choice = await ask(asgi, tools=[WEATHER, CLOCK], tool_choice="required")
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"place": "Ulm"}'
    assert prompt_of(scheduler).endswith("<think>\n\n</think>\n\n<tool_call>\n")
    schema = json.loads(scheduler.runs[-1].request.sampling.grammar.json_schema)
    assert len(schema["anyOf"]) == 2
    place = schema["$defs"]["tool0"]["properties"]["place"]["$ref"]
    assert place == "#/$defs/tool0/$defs/place"
    named = {"type": "function", "function": {"name": "weather"}}
    choice = await ask(asgi, tools=[WEATHER, CLOCK], tool_choice=named)
    assert choice["finish_reason"] == "stop"  # as OpenAI has it
    schema = json.loads(scheduler.runs[-1].request.sampling.grammar.json_schema)
    assert schema["properties"]["name"] == {"const": "weather"}


async def test_llama_3_calls_by_another_key(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.chat_template = LLAMA_TEMPLATE
    scheduler.script = says('{"name": "weather", "parameters": {"place": "Ulm"}}')
    choice = await ask(asgi, tools=[WEATHER])
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"place": "Ulm"}'
    choice = await ask(asgi, tools=[WEATHER], tool_choice="required")
    schema = json.loads(scheduler.runs[-1].request.sampling.grammar.json_schema)
    assert schema["required"] == ["name", "parameters"]
    assert prompt_of(scheduler).endswith("<|assistant|>")
    choice = await ask(asgi, tools=[WEATHER], tool_choice="none")
    assert choice["message"]["content"].startswith('{"name"')


async def test_a_tool_format_may_be_set(scheduler: ScriptedScheduler) -> None:
    scheduler.chat_template = LLAMA_TEMPLATE
    scheduler.script = says(f"<think>x</think>{CALL}")
    name = tiny_model.NAME
    settings = settings_for(
        scheduler, tool_formats=f"{name}=hermes,x=none", reasoning_formats=f"{name}=think"
    )
    async with (
        SchedulerClient(settings).running() as client,
        serving(client, settings) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        message = (await ask(http, tools=[WEATHER]))["message"]
    assert message["reasoning_content"] == "x"
    assert message["tool_calls"][0]["function"]["name"] == "weather"
