"""Idempotency keys: the same call again, and the rest of its stream."""

import asyncio
from typing import Any

import httpx
import pytest

from gateway_http.client import Generation
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.openai_streams import chat_events, contents, encode_events
from tests.gateway.scripted import WAIT_S, ScriptedScheduler
from tests.gateway.scripted_runs import Run, failure, leave_alone, reply_at_once

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": tiny_model.NAME, "prompt": "Hi", "max_tokens": 200}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_last_event_id_continues_after_any_event(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, path: str
) -> None:
    scheduler.script = leave_alone
    body = {**(COMPLETION if "chat" not in path else CHAT), "stream": True, "stop": "STOP"}
    headers = {"Idempotency-Key": "k"}
    async with http.stream("POST", path, json=body, headers=headers) as response:
        run = await scheduler.run()
        for token_id in tiny_model.encode("Grüße! a ST"):
            run.emit([token_id])
            scheduler.publish()
        run.end(reason=generation_pb2.FINISH_REASON_LENGTH)
        run.finish()
        scheduler.publish()
        text = (await response.aread()).decode()
    blocks = text.split("\n\n")
    whole = contents(chat_events(text))
    assert whole == "Grüße! a ST"
    numbered = [number for number, block in enumerate(blocks) if block.startswith("id: ")]
    assert numbered
    for number in numbered:
        event_id = blocks[number].splitlines()[0].removeprefix("id: ")
        seen = "\n\n".join(blocks[: number + 1])
        resumed = await http.post(path, json=body, headers={**headers, "Last-Event-ID": event_id})
        assert contents(chat_events(seen)) + contents(chat_events(resumed.text)) == whole
        finishes = (seen + resumed.text).count('"finish_reason":"length"')
        assert finishes == 1
        assert resumed.text.endswith("data: [DONE]\n\n")
    assert len(scheduler.runs) == 1


@pytest.mark.parametrize("value", ["1", "run-0:", "run-0:x", ":1", "run-0:-1", "run-0:" + "1" * 10])
async def test_a_last_event_id_that_is_none(asgi: httpx.AsyncClient, value: str) -> None:
    headers = {"Idempotency-Key": "k", "Last-Event-ID": value}
    body = {**COMPLETION, "stream": True}
    response = await asgi.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Last-Event-ID"


@pytest.mark.parametrize(
    ("changes", "headers"),
    [
        ({}, {}),
        ({"stream": False}, {"Idempotency-Key": "k"}),
        ({"n": 2}, {"Idempotency-Key": "k"}),
        ({"prompt": ["a", "b"]}, {"Idempotency-Key": "k"}),
    ],
)
async def test_only_streams_of_one_choice_with_a_key_continue(
    asgi: httpx.AsyncClient, changes: dict[str, Any], headers: dict[str, str]
) -> None:
    body = {**COMPLETION, "stream": True, **changes}
    headers = {**headers, "Last-Event-ID": "run-0:1"}
    response = await asgi.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 400


async def test_another_draw_is_never_joined_to_a_stream_that_is_gone(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    body = {**COMPLETION, "stream": True}
    headers = {"Idempotency-Key": "k", "Last-Event-ID": "run-of-old:4"}
    response = await asgi.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 410
    assert response.json()["error"]["code"] == "result_expired"
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_leads_back_to_work_whose_reader_hung_up(
    base_url: str, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    has_left = asyncio.Event()
    cancel = Generation.cancel

    def leave(self: Generation) -> None:
        cancel(self)
        has_left.set()

    monkeypatch.setattr(Generation, "cancel", leave)
    scheduler.script = leave_alone
    body = {**COMPLETION, "stream": stream}
    headers = {"Idempotency-Key": "k"}
    async with httpx.AsyncClient(base_url=base_url, timeout=60) as http:
        call = asyncio.create_task(http.post("/v1/completions", json=body, headers=headers))
        run = await scheduler.run()
        encode_events(run, "so ")
        scheduler.publish()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await asyncio.wait_for(has_left.wait(), WAIT_S)
        again = asyncio.create_task(http.post("/v1/completions", json=body, headers=headers))
        await scheduler.until(lambda: scheduler.num_submits == 2)
        encode_events(run, "far")
        run.end()
        run.finish()
        scheduler.publish()
        response = await again
    assert response.status_code == 200
    assert "far" in response.text
    assert (len(scheduler.runs), scheduler.cancelled) == (1, [])


async def test_a_repeated_call_finds_the_prompts_that_were_taken_before(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    def refuse_second(run: Run) -> None:
        scheduler.refusal = failure(Reason.QUEUE_FULL)

    scheduler.script = refuse_second
    body = {**COMPLETION, "prompt": ["a", "b"]}
    headers = {"Idempotency-Key": "k"}
    refused = await http.post("/v1/completions", json=body, headers=headers)
    assert refused.status_code == 429
    scheduler.refusal = None
    scheduler.script = reply_at_once
    reply_at_once(scheduler.runs[0])
    response = await http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert scheduler.cancelled == []


@pytest.mark.parametrize(
    ("path", "first", "changes"),
    [
        ("completions", {"prompt": "a"}, {"prompt": ["a", "b"]}),
        ("completions", {"prompt": ["a", "b"]}, {"prompt": "a"}),
        ("completions", {"prompt": ["a", "b"]}, {"prompt": ["a", "b", "c"]}),
        ("completions", {"prompt": ["a", "b"]}, {"prompt": ["b", "a"]}),
        ("completions", {"prompt": ["a", "b"]}, {"prompt": ["a", "c"]}),
        ("completions", {}, {"prompt": "other"}),
        ("completions", {}, {"n": 2}),
        ("completions", {}, {"max_tokens": 3}),
        ("completions", {}, {"logprobs": 1}),
        ("completions", {}, {"echo": True, "logprobs": 0}),
        ("completions", {}, {"model": tiny_model.BARE_NAME, "prompt": [1]}),
        ("completions", {}, {"priority": 1}),
        ("chat/completions", CHAT, {"n": 2}),
        ("chat/completions", CHAT, {"messages": [{"role": "user", "content": "Ho"}]}),
        ("chat/completions", CHAT, {"seed": 1}),
        ("responses", {"input": "a"}, {"input": "b"}),
    ],
)
async def test_a_key_of_another_request_is_refused(
    http: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    path: str,
    first: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    common = COMPLETION if path == "completions" else {"model": tiny_model.NAME}
    headers = {"Idempotency-Key": "k"}
    body = {**common, **first}
    response = await http.post(f"/v1/{path}", json=body, headers=headers)
    assert response.status_code == 200, response.text
    num_runs = len(scheduler.runs)
    for _ in range(2):  # which changes nothing about the key
        refused = await http.post(f"/v1/{path}", json={**body, **changes}, headers=headers)
        assert refused.status_code == 422, refused.text
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("request_id_conflict", "Idempotency-Key")
        assert "a new Idempotency-Key" in error["message"]
        assert refused.headers["x-should-retry"] == "false"
        again = await http.post(f"/v1/{path}", json=body, headers=headers)
        assert again.json()["id"] == response.json()["id"]
    assert len(scheduler.runs) == num_runs, "no prompt was begun for nothing"


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"echo": True},
        {"return_token_ids": True},
        {"include_timing": True},
        {"user": "another"},
    ],
)
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_a_key_does_not_say_how_its_answer_is_told(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, changes: dict[str, Any], prompt: Any
) -> None:
    headers = {"Idempotency-Key": "k"}
    body = {**COMPLETION, "prompt": prompt}
    first = await http.post("/v1/completions", json=body, headers=headers)
    again = await http.post("/v1/completions", json={**body, **changes}, headers=headers)
    assert (first.status_code, again.status_code) == (200, 200), again.text
    assert first.json()["id"] in again.text
    assert len(scheduler.runs) == len(prompt)


async def test_a_key_as_long_as_may_be_stands_for_several_prompts(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    longest = 256  # as the OpenAPI document says
    headers = {"Idempotency-Key": "k" * longest}
    body = {**COMPLETION, "prompt": ["a", "b"]}
    assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == 200
    own = [run.request.idempotency_key for run in scheduler.runs]
    assert own[0] == headers["Idempotency-Key"]
    assert len(own[1]) <= longest


async def test_keys_of_two_prompts_are_not_those_of_other_calls(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    for key in ("k", "K"):
        body = {**COMPLETION, "prompt": ["a", "b", "c"]}
        response = await http.post("/v1/completions", json=body, headers={"Idempotency-Key": key})
        assert response.status_code == 200
    assert len({run.request.idempotency_key for run in scheduler.runs}) == 6
