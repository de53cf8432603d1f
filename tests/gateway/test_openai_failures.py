"""What clients see of refusals and failures, and what is left when a client goes away."""

import asyncio

import httpx
import openai
import pytest

from headway.reasons import Reason
from tests.gateway import tiny_model
from tests.gateway.openai_streams import chat_events, contents, encode_events
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import Run, failure, leave_alone

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": tiny_model.NAME, "prompt": "Hi", "max_tokens": 200}


@pytest.mark.parametrize(
    ("reason", "status", "should_retry"),
    [
        (Reason.QUEUE_FULL, 429, "true"),
        (Reason.DEADLINE_UNREACHABLE, 429, "true"),
        (Reason.NO_CAPACITY, 503, "true"),
        (Reason.REQUEST_ID_CONFLICT, 422, "false"),
        (Reason.INTERNAL, 500, "false"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_have_their_real_status_even_when_streaming(
    asgi: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    reason: Reason,
    status: int,
    should_retry: str,
    stream: bool,
) -> None:
    scheduler.refusal = failure(reason, 7100)
    response = await asgi.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["code"] == reason.lower()
    assert response.headers["x-should-retry"] == should_retry
    assert response.headers.get("retry-after") == ("8" if should_retry == "true" else None)


@pytest.mark.parametrize(("wait_ms", "told"), [(1, "1"), (1_001, "2"), (10**7, "60")])
async def test_retry_after_is_what_sdks_go_by(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler, wait_ms: int, told: str
) -> None:
    scheduler.refusal = failure(Reason.QUEUE_FULL, wait_ms)
    response = await asgi.post("/v1/chat/completions", json=CHAT)
    assert response.headers["retry-after"] == told


async def test_a_failure_after_acceptance(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    def fail_late(run: Run) -> None:
        encode_events(run, "so far")
        run.finish(failure(Reason.EXECUTION_TIMEOUT))

    scheduler.script = fail_late
    whole = await http.post("/v1/chat/completions", json=CHAT)
    assert whole.status_code == 504
    streamed = await http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert streamed.status_code == 200
    *_, last = events = chat_events(streamed.text)
    assert contents(events[:-1]) == "so far"
    assert last["error"]["code"] == "execution_timeout"
    assert "[DONE]" not in streamed.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("has_tokens", [False, True])
async def test_a_client_that_hangs_up_cancels_its_work(
    base_url: str, scheduler: ScriptedScheduler, stream: bool, has_tokens: bool
) -> None:
    scheduler.script = leave_alone
    async with httpx.AsyncClient(base_url=base_url) as http:
        call = asyncio.create_task(
            http.post("/v1/completions", json={**COMPLETION, "stream": stream})
        )
        run = await scheduler.run()
        if has_tokens:
            encode_events(run, "some")
            scheduler.publish()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await scheduler.until(lambda: scheduler.cancelled == [run.request_id])


async def test_a_hang_up_cancels_every_prompt(base_url: str, scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    async with httpx.AsyncClient(base_url=base_url) as http:
        body = {**COMPLETION, "prompt": ["a", "b", "c"]}
        call = asyncio.create_task(http.post("/v1/completions", json=body))
        await scheduler.until(lambda: len(scheduler.runs) == 3)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await scheduler.until(lambda: len(scheduler.cancelled) == 3)


async def test_one_refused_prompt_refuses_all_and_cancels_the_others(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone

    def refuse_second(run: Run) -> None:
        scheduler.refusal = failure(Reason.QUEUE_FULL)

    scheduler.script = refuse_second
    response = await http.post("/v1/completions", json={**COMPLETION, "prompt": ["a", "b"]})
    assert response.status_code == 429
    await scheduler.until(lambda: len(scheduler.cancelled) == 1)


async def test_a_broken_scheduler_stream_is_not_seen_by_the_client(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    token_ids = tiny_model.encode(tiny_model.REPLY)
    async with http.stream("POST", "/v1/completions", json={**COMPLETION, "stream": True}) as got:
        run = await scheduler.run()
        run.emit(token_ids[:9])
        scheduler.publish()
        lines = got.aiter_lines()
        while not (await anext(lines)).startswith("data:"):
            pass
        for number, token_id in enumerate(token_ids[9:]):
            scheduler.drop_connections()
            run.emit([token_id])
            await scheduler.until(lambda number=number: len(scheduler.resumes) > number)  # type: ignore[misc]
            scheduler.publish()
        run.end()
        run.finish()
        scheduler.publish()
        rest = "\n".join([line async for line in lines])
    expected = tiny_model.tokenizer().decode(token_ids[:9])
    assert (expected.rstrip("\ufffd") + contents(chat_events(rest))) == tiny_model.REPLY


async def test_the_sdk_sees_an_error_in_mid_stream(
    base_url: str, scheduler: ScriptedScheduler
) -> None:
    def fail_late(run: Run) -> None:
        encode_events(run, "so far")
        run.finish(failure(Reason.ATTEMPTS_EXHAUSTED))

    scheduler.script = fail_late
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="any") as sdk:
        stream = await sdk.chat.completions.create(**CHAT, stream=True)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError):
            [chunk async for chunk in stream]
