"""Chats, completions and models over real sockets against a scripted scheduler."""

from typing import Any

import httpx
import openai
import pytest

from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.openai_streams import chat_events, contents, encode_events
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import Run, leave_alone

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": tiny_model.NAME, "prompt": "Hi", "max_tokens": 200}


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
