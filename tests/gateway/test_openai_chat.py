"""Chats with thoughts and formats, over a scheduler that says what a test wants."""

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest

from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.chats import (
    CALL,
    CLOCK,
    PATH,
    TEMPLATE,
    USER,
    WEATHER,
    added_up,
    ask,
    chat,
    events,
    prompt_of,
    refused,
    says,
)
from tests.gateway.conftest import settings_for
from tests.gateway.scripted import ScriptedScheduler


@pytest.fixture(autouse=True)
def _template(scheduler: ScriptedScheduler) -> None:
    scheduler.chat_template = TEMPLATE


async def test_a_thought_stands_beside_the_answer(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says("<think>\nwell, ü\n</think>\n\nyes")
    choice = await ask(asgi)
    assert choice["message"]["reasoning_content"] == "well, ü"
    assert choice["message"]["content"] == "yes"
    assert choice["finish_reason"] == "stop"
    response = await asgi.post(PATH, json=chat(stream=True))
    message = added_up(events(response.text))
    assert (message["reasoning_content"], message["content"]) == ("well, ü", "yes")
    choice = await ask(asgi, include_reasoning=False)
    assert "reasoning_content" not in choice["message"]
    response = await asgi.post(PATH, json=chat(stream=True, include_reasoning=False))
    deltas = [chunk["choices"][0]["delta"] for chunk in events(response.text)]
    assert {} not in deltas[:-1]
    assert added_up(events(response.text))["reasoning_content"] == ""
    usage = (await asgi.post(PATH, json=chat())).json()["usage"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


async def test_thinking_can_be_switched_off(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    for fields in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
    ):
        scheduler.runs.clear()
        await ask(asgi, **fields)
        assert prompt_of(scheduler).endswith("<think>\n\n</think>\n\n")
    await ask(asgi, chat_template_kwargs={"enable_thinking": True})
    assert prompt_of(scheduler).endswith("<|assistant|>")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"json_schema": json.dumps(SCHEMA)},
        ),
        ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": json.dumps(SCHEMA)}),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            {"json_schema": json.dumps(SCHEMA)},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        (
            {"structured_outputs": {"choice": ["yes", "no"], "json": None}},
            {"choice": generation_pb2.Choice(texts=["yes", "no"])},
        ),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
    ],
)
async def test_formats_become_grammars(
    asgi: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    fields: dict[str, Any],
    grammar: dict[str, Any],
) -> None:
    await ask(asgi, **fields)
    found = scheduler.runs[-1].request.sampling.grammar
    expected = generation_pb2.Grammar(**grammar)
    assert found.WhichOneof("kind") == expected.WhichOneof("kind")
    if found.json_schema:
        assert json.loads(found.json_schema) == json.loads(expected.json_schema)
    else:
        assert found == expected
    assert prompt_of(scheduler).endswith("<think>\n\n</think>\n\n")  # no thought comes first


def deep(levels: int) -> dict[str, Any]:
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("limit", "schema"),
    [({"max_schema_levels": 3}, deep(3)), ({"max_schema_values": 5}, {"enum": [1, 2, 3, 4]})],
)
async def test_how_large_a_schema_may_be_is_a_setting(
    client: SchedulerClient, scheduler: ScriptedScheduler, limit: dict[str, int], schema: Any
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for changes, status in (({}, 200), (limit, 400)):
        transport = httpx.ASGITransport(build_app(client, settings_for(scheduler, **changes)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            for fields in ({"structured_outputs": {"json": schema}}, {"tools": [tool]}):
                response = await http.post(PATH, json=chat(**fields))
                assert response.status_code == status, response.text


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": "x"}}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": "a" * 3000}}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": ""}}),
        ("structured_outputs.choice", {"structured_outputs": {"choice": []}}),
        ("structured_outputs.choice", {"structured_outputs": {"choice": ["a", "a"]}}),
        ("structured_outputs.json", {"structured_outputs": {"json": "{"}}),
        ("structured_outputs.json", {"structured_outputs": {"json": [1]}}),
        ("structured_outputs.json", {"structured_outputs": {"json": {"$ref": "http://x"}}}),
        ("structured_outputs.json", {"structured_outputs": {"json": deep(40)}}),
        ("structured_outputs.json", {"structured_outputs": {"json": {"a": "x" * 70_000}}}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        (
            "structured_outputs",
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        ),
        (
            "chat_template_kwargs.enable_thinking",
            {
                "response_format": {"type": "json_object"},
                "chat_template_kwargs": {"enable_thinking": True},
            },
        ),
        ("tools", {"tools": [WEATHER] + [{**CLOCK}] * 200}),
        ("tools[1].function.name", {"tools": [WEATHER, WEATHER]}),
        (
            "tools[0].function.name",
            {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
        ),
        (
            "tools[0].function.parameters",
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep(40)}}]},
        ),
        (
            "tool_choice.function.name",
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "no_such"}},
            },
        ),
        ("tool_choice", {"tool_choice": "required"}),
        (
            "messages[0].tool_calls",
            {"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}]},
        ),
        (
            "messages[1].tool_calls[0].function.arguments",
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
                    },
                ]
            },
        ),
    ],
)
async def test_what_cannot_be_had_is_refused_by_name(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler, param: str, fields: dict[str, Any]
) -> None:
    assert await refused(asgi, **fields) == param
    assert scheduler.runs == []


async def test_a_final_message_goes_on(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    messages = [USER, {"role": "assistant", "content": "<think>so"}]
    scheduler.script = says(" it is</think>yes")
    fields = {"messages": messages, "continue_final_message": True}
    choice = await ask(asgi, **fields, add_generation_prompt=False)
    assert prompt_of(scheduler).endswith("<|assistant|><think>so")
    assert choice["message"]["reasoning_content"] == " it is"
    assert choice["message"]["content"] == "yes"
    assert await refused(asgi, **fields, add_generation_prompt=True) == "add_generation_prompt"


async def test_alternatives_of_each_token(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says("ü")
    choice = await ask(asgi, logprobs=True, top_logprobs=2)
    entries = choice["logprobs"]["content"]
    data = b"".join(bytes(entry["bytes"]) for entry in entries[:-1])
    assert data == "ü".encode()
    for number, entry in enumerate(entries):
        assert entry["logprob"] == -number - 0.5
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"]
    response = await asgi.post(PATH, json=chat(stream=True, logprobs=True, top_logprobs=2))
    streamed = [
        entry
        for chunk in events(response.text)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == entries


async def test_where_the_time_went(asgi: httpx.AsyncClient) -> None:
    expected = {
        "queue_s": 0.3,
        "queue_place_s": 0.2,
        "queue_model_s": 0.1,
        "prefill_s": 0.2,
        "decode_s": 1.0,
        "total_s": 1.5,
        "num_attempts": 1,
        "executor_id": "executor-1",
        "num_cached_tokens": 2,
        "is_inexact": False,
    }
    whole = await asgi.post(PATH, json=chat(include_timing=True))
    assert whole.json()["timing"] == expected
    streamed = await asgi.post(PATH, json=chat(include_timing=True, stream=True))
    last = events(streamed.text)[-1]
    assert (last["choices"], last["timing"]) == ([], expected)
    assert "usage" not in last
    assert "timing" not in (await asgi.post(PATH, json=chat())).json()


async def test_headers_say_what_the_body_leaves_out(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    headers = {"x-headway-priority": "2", "x-headway-session-id": "s", "x-request-id": "mine-1"}
    response = await asgi.post(PATH, json=chat(), headers=headers)
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["x-headway-request-id"] == "run-0"
    await asgi.post(PATH, json=chat(priority=1, session_id="t"), headers=headers)
    found = [(run.request.band, run.request.session_id) for run in scheduler.runs]
    assert found == [(2, "s"), (1, "t")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-headway-priority", "-1"),
        ("x-headway-priority", "high"),
        ("x-headway-session-id", "x" * 257),
        ("x-request-id", "a b"),
        ("x-request-id", "x" * 129),
    ],
)
async def test_headers_that_make_no_sense(asgi: httpx.AsyncClient, name: str, value: str) -> None:
    response = await asgi.post(PATH, json=chat(), headers={name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


async def test_a_refusal_has_its_callers_id(asgi: httpx.AsyncClient) -> None:
    response = await asgi.post(PATH, json=chat(n=0), headers={"x-request-id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (400, "mine")


class Answer(pydantic.BaseModel):
    """For .parse."""

    place: str


async def test_the_real_sdk_parses(base_url: str, scheduler: ScriptedScheduler) -> None:
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="any") as sdk:
        scheduler.script = says('{"place": "Ulm"}')
        parsed = await sdk.chat.completions.parse(
            model=tiny_model.NAME,
            messages=[{"role": "user", "content": "Hi"}],
            response_format=Answer,
        )
        assert parsed.choices[0].message.parsed == Answer(place="Ulm")
        scheduler.script = says(CALL.replace("weather", "Answer"))
        tool = openai.pydantic_function_tool(Answer)
        called = await sdk.chat.completions.parse(
            model=tiny_model.NAME, messages=[{"role": "user", "content": "Hi"}], tools=[tool]
        )
        calls = called.choices[0].message.tool_calls
        assert calls is not None
        assert calls[0].function.parsed_arguments == Answer(place="Köln")
        async with sdk.chat.completions.stream(
            model=tiny_model.NAME, messages=[{"role": "user", "content": "Hi"}], tools=[tool]
        ) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        streamed = final.choices[0].message.tool_calls
        assert streamed is not None
        assert streamed[0].function.parsed_arguments == Answer(place="Köln")
