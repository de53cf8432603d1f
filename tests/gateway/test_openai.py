"""The OpenAI endpoints over real sockets against a scripted scheduler."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from gateway_http.client import Generation
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.scripted import (
    WAIT_S,
    Run,
    ScriptedScheduler,
    failure,
    leave_alone,
    reply_at_once,
)

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": tiny_model.NAME, "prompt": "Hi", "max_tokens": 200}


def chat_events(text: str) -> list[Any]:
    return [
        json.loads(line.removeprefix("data: "))
        for line in text.splitlines()
        if line.startswith("data: {")
    ]


def contents(events: list[Any], index: int = 0) -> str:
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(
        one["delta"].get("content", "") if "delta" in one else one["text"]
        for one in choices
        if one["index"] == index
    )


def encode_events(run: Run, text: str) -> None:
    run.emit(tiny_model.encode(text))


async def test_a_chat(http: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    response = await http.post("/v1/chat/completions", json={**CHAT, "n": 2, "seed": -1})
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"] == "chatcmpl-run-0"
    assert response.headers["x-request-id"] == "run-0"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert choice["message"]["content"] == tiny_model.REPLY
        assert choice["finish_reason"] == "stop"
    request = scheduler.runs[0].request
    num_reply_tokens = len(tiny_model.encode(tiny_model.REPLY)) + 1
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": 2 * num_reply_tokens,
        "total_tokens": len(request.prompt_token_ids) + 2 * num_reply_tokens,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert request.sampling.seed == 2**64 - 1
    assert not request.sampling.HasField("max_tokens")


async def test_a_streamed_chat(http: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    async with http.stream("POST", "/v1/chat/completions", json={**CHAT, **options}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        run = await scheduler.run()
        for token_id in tiny_model.encode(tiny_model.REPLY):
            run.emit([token_id])
            scheduler.publish()
        run.emit([tiny_model.eos_id()])
        run.end(stop_token_id=tiny_model.eos_id())
        run.finish()
        scheduler.publish()
        text = (await response.aread()).decode()
    events = chat_events(text)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert contents(events) == tiny_model.REPLY
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == len(run.tokens[0])
    assert all(event["usage"] is None for event in events[:-1])
    assert text.endswith("data: [DONE]\n\n")
    logprobs = [
        entry
        for event in events[:-1]
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [entry["logprob"] for entry in logprobs] == [-i - 0.5 for i in range(len(run.tokens[0]))]
    assert text.count("\nid: run-0:") == len(events) - 2  # all but opening and usage


async def test_completions_of_every_kind_of_prompt(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    texts: list[Any] = ["Hi", ["Hi", "there"], [1, 2, 3], [[1, 2], [3]]]
    for prompt, count in zip(texts, (1, 2, 1, 2), strict=True):
        scheduler.runs.clear()
        body = {**COMPLETION, "prompt": prompt, "n": 2, "logprobs": 0}
        response = await asgi.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(2 * count))
        assert all(choice["text"] == tiny_model.REPLY for choice in choices)
        logprobs = choices[0]["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"])
        assert logprobs["text_offset"][:3] == [0, 1, 2]
        assert len(scheduler.runs) == count


async def test_every_field_reaches_the_scheduler(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "stop": ["a b", "c"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "min_tokens": 2,
        "max_completion_tokens": 9,
        "session_id": "s",
        "priority": 2,
        "queue_timeout_s": 1.5,
        "execution_timeout_s": 60,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"5": -100, "6": 2.5},
        "logprobs": True,
        "top_logprobs": 2,
        "some_new_parameter": None,
    }
    headers = {"Idempotency-Key": "key-1"}
    response = await asgi.post("/v1/chat/completions", json={**CHAT, **fields}, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["finish_reason"] == "length"
    request = scheduler.runs[0].request
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
    assert (sampling.min_p, sampling.max_tokens, sampling.min_tokens) == (0.125, 9, 2)
    assert list(sampling.stop_strings) == ["a b", "c"]
    assert list(sampling.stop_token_ids) == [4]
    assert sampling.ignore_eos
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.5, 0.5)
    assert sampling.repetition_penalty == 1.25
    assert {one.token_id: one.bias for one in sampling.logit_bias} == {5: -100, 6: 2.5}
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 2)
    assert (request.session_id, request.band, request.idempotency_key) == ("s", 2, "key-1")
    assert request.queue_timeout.ToMilliseconds() == 1500
    assert request.execution_timeout.ToMilliseconds() == 60_000


async def test_a_stop_string_is_cut_and_never_shown_in_part(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    body = {**COMPLETION, "stop": "STOP", "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        run = await scheduler.run()
        for token_id in tiny_model.encode("a STO b STOP"):
            run.emit([token_id])
            scheduler.publish()
        run.end(stop_string="STOP")
        run.finish()
        scheduler.publish()
        events = chat_events((await response.aread()).decode())
    assert contents(events) == "a STO b "


async def test_models(asgi: httpx.AsyncClient) -> None:
    models = (await asgi.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == [tiny_model.BARE_NAME, tiny_model.NAME]
    one = await asgi.get(f"/v1/models/{tiny_model.NAME}")
    assert one.json()["max_model_len"] == tiny_model.CONTEXT
    missing = await asgi.get("/v1/models/no/such")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_a_model_without_tokenizer_takes_and_gives_token_ids(asgi: httpx.AsyncClient) -> None:
    body = {"model": tiny_model.BARE_NAME, "prompt": [1, 2], "max_tokens": 3, "logprobs": 0}
    choice = (await asgi.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["token_ids"] == tiny_model.encode(tiny_model.REPLY)[:3]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"][0] == f"token_id:{choice['token_ids'][0]}"
    for change in (
        {"prompt": "text"},
        {"stop": "x"},
        {"structured_outputs": {"choice": ["x"]}},
        {"response_format": {"type": "json_object"}},
    ):
        refused = await asgi.post("/v1/completions", json={**body, **change})
        assert refused.status_code == 400
        assert "no tokenizer" in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == next(iter(change))


PARAMETERS: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": 3}),
    ("top_p", {"top_p": 0}),
    ("n", {"n": 0}),
    ("n", {"n": 10**6}),
    ("n", {"n": True}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 10**9}),
    ("max_tokens", {"max_tokens": 10**30}),
    ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 5}),
    ("min_tokens", {"min_tokens": 10**6}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": ["x" * 257]}),
    ("stop", {"stop": ""}),
    ("stop[0]", {"stop": [1]}),
    ("stop_token_ids[0]", {"stop_token_ids": [-1]}),
    ("queue_timeout_s", {"queue_timeout_s": -1}),
    ("messages", {"messages": []}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].role", {"messages": [{"role": "poet", "content": "x"}]}),
    ("messages[0].weird", {"messages": [{"role": "user", "content": "x", "weird": 1}]}),
    (
        "messages[0].content[0].type",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ),
    (
        "messages[0].content[0].text",
        {"messages": [{"role": "user", "content": [{"type": "text", "txt": "x"}]}]},
    ),
    ("messages", {"messages": [{"role": "assistant", "content": "first"}]}),
    ("model", {"model": 5}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 0}),
    ("tools[0].function", {"tools": [{"type": "function"}]}),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),  # no known format
    ("response_format.type", {"response_format": {"type": "grammar"}}),
    ("presence_penalty", {"presence_penalty": 3}),
    ("frequency_penalty", {"frequency_penalty": -2.5}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("logit_bias", {"logit_bias": {"a": 1}}),
    ("logit_bias[...]", {"logit_bias": {"1": 101}}),
    ("logit_bias", {"logit_bias": {"100000": 1}}),
    ("logit_bias", {"logit_bias": {str(number): 1 for number in range(1025)}}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
    ("store", {"store": True}),
    ("messages", {"messages": None}),
    ("reasoning_effort", {"reasoning_effort": "high"}),
    ("chat_template", {"chat_template": "{{ 1 }}"}),
    ("chat_template_kwargs.date", {"chat_template_kwargs": {"date": "x"}}),
    ("chat_template_kwargs.enable_thinking", {"chat_template_kwargs": {"enable_thinking": 1}}),
    ("continue_final_message", {"continue_final_message": True}),
    ("guided_json", {"guided_json": {}}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("n", {"n": 65}),
    ("best_of", {"best_of": 2}),
]


@pytest.mark.parametrize(("param", "change"), PARAMETERS)
async def test_bad_parameters_are_refused_by_name(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler, param: str, change: dict[str, Any]
) -> None:
    response = await asgi.post("/v1/chat/completions", json={**CHAT, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["content-length"] == str(len(response.content))
    assert scheduler.runs == []


async def test_unsupported_is_its_own_code(asgi: httpx.AsyncClient) -> None:
    for change in ({"best_of": 3}, {"no_such": 1}, {"messages": [{"role": "user", "no": 1}]}):
        response = await asgi.post("/v1/chat/completions", json={**CHAT, **change})
        assert response.json()["error"]["code"] == "unsupported_parameter"
    response = await asgi.post("/v1/completions", json={**COMPLETION, "logprobs": 21})
    assert response.json()["error"]["param"] == "logprobs"


@pytest.mark.parametrize(
    "prompt", [[], [[]], ["a", 1], ["a", [1]], [10**6], [-1], [2**40], 7, {}, [True]]
)
async def test_bad_prompts(asgi: httpx.AsyncClient, prompt: Any) -> None:
    response = await asgi.post("/v1/completions", json={**COMPLETION, "prompt": prompt})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("prompt")


@pytest.mark.parametrize("prompt", [[1] * tiny_model.CONTEXT, "the fleet " * 10**5])
async def test_prompts_that_are_too_long(asgi: httpx.AsyncClient, prompt: Any) -> None:
    response = await asgi.post("/v1/completions", json={**COMPLETION, "prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "maximum context length" in response.json()["error"]["message"]


async def test_an_unknown_model(asgi: httpx.AsyncClient) -> None:
    response = await asgi.post("/v1/chat/completions", json={**CHAT, "model": "no/such"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


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


async def test_a_completion_that_names_no_length_fits_into_the_context(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    for num_tokens, expected in ((10, 16), (tiny_model.CONTEXT - 3, 3)):
        scheduler.runs.clear()
        body = {"model": tiny_model.NAME, "prompt": [1] * num_tokens}
        response = await asgi.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert scheduler.runs[0].request.sampling.max_tokens == expected


async def test_what_the_models_makers_want_stands_in_for_what_is_left_out(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.generation_config = (
        b'{"temperature": 0.25, "top_p": 0.5, "top_k": 20, "repetition_penalty": 1.5, "x": 1}'
    )
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        scheduler.runs.clear()
        assert (await asgi.post(path, json=body)).status_code == 200
        own = {**body, "temperature": 1, "top_p": 1, "top_k": -1}
        assert (await asgi.post(path, json=own)).status_code == 200
        wanted, asked = (run.request.sampling for run in scheduler.runs)
        assert (wanted.temperature, wanted.top_p, wanted.top_k) == (0.25, 0.5, 20)
        assert (asked.temperature, asked.top_p, asked.top_k) == (1, 1, 0)
        assert wanted.repetition_penalty == 1.5


async def test_the_real_sdk(base_url: str, scheduler: ScriptedScheduler) -> None:
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="any") as sdk:
        chat = await sdk.chat.completions.create(**CHAT)  # type: ignore[call-overload]
        assert chat.choices[0].message.content == tiny_model.REPLY
        stream = await sdk.chat.completions.create(  # type: ignore[call-overload]
            **CHAT, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage.prompt_tokens == chat.usage.prompt_tokens
        text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
        assert text == tiny_model.REPLY
        completion = await sdk.completions.create(**COMPLETION)  # type: ignore[call-overload]
        assert completion.choices[0].text == tiny_model.REPLY
        stream = await sdk.completions.create(**COMPLETION, stream=True)  # type: ignore[call-overload]
        text = "".join([chunk.choices[0].text async for chunk in stream])
        assert text == tiny_model.REPLY
        assert len((await sdk.models.list()).data) == 2
        with pytest.raises(openai.NotFoundError):
            await sdk.models.retrieve("no/such")
        with pytest.raises(openai.BadRequestError):
            await sdk.chat.completions.create(**CHAT, reasoning_effort="high")  # type: ignore[call-overload]


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


async def test_finish_reason_of_a_stop_token_that_is_text(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    def stop_at_dot(run: Run) -> None:
        encode_events(run, "done.")
        run.end(stop_token_id=run.tokens[0][-1])
        run.finish()

    scheduler.script = stop_at_dot
    body = {**COMPLETION, "stop_token_ids": tiny_model.encode(".")}
    choice = (await asgi.post("/v1/completions", json=body)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("done.", "stop")
    assert generation_pb2.FINISH_REASON_STOP == 1
