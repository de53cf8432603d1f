"""POST /v1/responses with the real SDK, over a scheduler that says what a test wants."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from headway.reasons import Reason
from tests.gateway import tiny_model
from tests.gateway.chats import CALL, TEMPLATE, prompt_of, says
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import Run, failure

NAME = tiny_model.NAME
FLAT_WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}
REPLY = f"<think>\nhm\n</think>\n\nI look.\n{CALL}"


@pytest.fixture(autouse=True)
def _template(scheduler: ScriptedScheduler) -> None:
    scheduler.chat_template = TEMPLATE


@pytest.fixture
async def sdk(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


async def test_an_answer(sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler) -> None:
    scheduler.script = says("yes")
    response = await sdk.responses.create(model=NAME, input="Hi", instructions="Be short.")
    assert response.output_text == "yes"
    assert (response.status, response.id) == ("completed", "resp_run-0")
    assert response.model_dump()["store"] is False
    assert prompt_of(scheduler).startswith("<|system|>Be short.<|end|>\n<|user|>Hi<|end|>")
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert response.usage.total_tokens == response.usage.input_tokens + 4


async def test_what_was_asked_is_said_back(
    sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says("yes")
    asked: Any = {"temperature": 0.25, "top_p": 0.5, "metadata": {"a": "b"}, "instructions": "Hm."}
    response = await sdk.responses.create(model=NAME, input="Hi", max_output_tokens=9, **asked)
    said = response.model_dump()
    assert {name: said[name] for name in asked} == asked
    assert said["max_output_tokens"] == 9
    plain = (await sdk.responses.create(model=NAME, input="Hi")).model_dump()
    assert [plain[name] for name in asked] == [None, None, {}, None]


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.INVALID_REQUEST, "invalid_prompt"),
        (Reason.QUOTA_EXCEEDED, "rate_limit_exceeded"),
        (Reason.INTERNAL, "server_error"),
    ],
)
async def test_a_late_failure_has_a_code_of_openais(
    sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler, reason: Reason, code: str
) -> None:
    scheduler.script = lambda run: run.finish(failure(reason))
    events = [
        event async for event in await sdk.responses.create(model=NAME, input="x", stream=True)
    ]
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == code


async def test_thoughts_words_and_calls_are_items(
    sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says(REPLY)
    response = await sdk.responses.create(model=NAME, input="Hi", tools=[FLAT_WEATHER])
    thought, message, call = response.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert thought.content[0].text == "hm"
    assert message.type == "message"
    assert response.output_text == "I look."
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", {"place": "Köln"})
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0


async def test_events_add_up_to_the_response(
    sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says(REPLY)
    whole = await sdk.responses.create(model=NAME, input="Hi", tools=[FLAT_WEATHER])
    async with sdk.responses.stream(model=NAME, input="Hi", tools=[FLAT_WEATHER]) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert (
        kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    )
    for kind in (
        "response.reasoning_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
    ):
        assert kind in kinds
    assert final.output_text == whole.output_text == "I look."
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.usage == whole.usage


async def test_earlier_turns_are_items_too(
    sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says(REPLY)
    first = await sdk.responses.create(model=NAME, input="Hi", tools=[FLAT_WEATHER])
    call = first.output[-1]
    assert call.type == "function_call"
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    await sdk.responses.create(model=NAME, input=items, tools=[FLAT_WEATHER])
    told = '<|assistant|><think>hm</think>I look.<tool_call>{"name": "weather", "arguments": '
    assert told + '{"place": "Köln"}}</tool_call><|end|>\n<|user|>rain<|end|>' in prompt_of(
        scheduler
    )


class Answer(pydantic.BaseModel):
    """For .parse."""

    place: str


async def test_formats(sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler) -> None:
    scheduler.script = says('{"place": "Ulm"}')
    parsed = await sdk.responses.parse(model=NAME, input="Hi", text_format=Answer)
    assert parsed.output_parsed == Answer(place="Ulm")
    schema = json.loads(scheduler.runs[-1].request.sampling.grammar.json_schema)
    assert schema["required"] == ["place"]
    scheduler.script = says('{"name": "weather", "arguments": {"place": "Ulm"}}')
    forced = await sdk.responses.create(
        model=NAME,
        input="Hi",
        tools=[FLAT_WEATHER],
        tool_choice={"type": "function", "name": "weather"},
    )
    assert [item.type for item in forced.output] == ["function_call"]
    assert scheduler.runs[-1].request.sampling.grammar.json_schema


async def test_a_length_that_was_reached(
    sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler
) -> None:
    response = await sdk.responses.create(model=NAME, input="Hi", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    stream = await sdk.responses.create(model=NAME, input="Hi", max_output_tokens=3, stream=True)
    assert [event.type async for event in stream][-1] == "response.incomplete"


async def test_logprobs_of_the_text(sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler) -> None:
    scheduler.script = says("<think>a</think>ok.")
    wish: Any = {
        "model": NAME,
        "input": "Hi",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    response = await sdk.responses.create(**wish)
    content = response.output[-1].content[0]
    assert content.type == "output_text"
    assert content.logprobs
    assert len(content.logprobs[0].top_logprobs) == 2


async def test_a_failure_in_mid_stream(
    sdk: openai.AsyncOpenAI, scheduler: ScriptedScheduler
) -> None:
    def fail_late(run: Run) -> None:
        run.emit(tiny_model.encode("so far"))
        run.finish(failure(Reason.ATTEMPTS_EXHAUSTED))

    scheduler.script = fail_late
    stream = await sdk.responses.create(model=NAME, input="Hi", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert last.response.output_text == "so far"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("conversation", {"conversation": "c"}),
        ("store", {"store": True}),
        ("background", {"background": True}),
        ("truncation", {"truncation": "auto"}),
        ("reasoning.effort", {"reasoning": {"effort": "high"}}),
        ("include[0]", {"include": ["file_search_call.results"]}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("input[0].type", {"input": [{"type": "item_reference", "id": "x"}]}),
        (
            "input[0].content[0].type",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        ),
        ("input[0].role", {"input": [{"content": "x"}]}),
        ("input[0]", {"input": [{"type": "function_call", "name": "f"}]}),
        (
            "text.format.schema",
            {"text": {"format": {"type": "json_schema", "schema": 7}}},
        ),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("n", {"n": 2}),
    ],
)
async def test_what_cannot_be_had_is_refused_by_name(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler, param: str, fields: dict[str, Any]
) -> None:
    response = await asgi.post("/v1/responses", json={"model": NAME, "input": "Hi", **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert scheduler.runs == []
