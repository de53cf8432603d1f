"""Streams that go on at another gateway when theirs is killed, and what calls may say beside."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from bench.stack import Stack

MODEL = "tools"
HI: Any = [{"role": "user", "content": "What does json.dumps do?"}]
SEEDED: dict[str, Any] = {"model": MODEL, "seed": 5, "ignore_eos": True}
CHAT = {**SEEDED, "messages": HI, "max_tokens": 200}
SAMPLES = {**SEEDED, "prompt": "import json", "max_tokens": 100, "n": 3, "echo": True}
RESPONSE = {**SEEDED, "input": "What is json?", "max_output_tokens": 200}


def events(text: str) -> list[Any]:
    lines = (line.removeprefix("data: ") for line in text.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]


def told(text: str) -> dict[int, str]:
    """The text of each choice of a chat, a completion or a response."""
    texts: dict[int, str] = {}
    for event in events(text):
        if event.get("type") == "response.output_text.delta":
            texts[0] = texts.get(0, "") + event["delta"]
        for choice in event.get("choices", ()):
            more = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + more
    return texts


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", SAMPLES),
        ("/v1/responses", RESPONSE),
    ],
    ids=["chat", "samples", "response"],
)
def test_another_gateway_goes_on_when_the_first_is_killed(
    stack: Stack, path: str, body: dict[str, Any]
) -> None:
    request = {**body, "stream": True}
    expected = told(httpx.post(stack.gateway_url + path, json=request, timeout=60).text)
    seen, last_id = "", ""
    with httpx.stream("POST", stack.gateway_url + path, json=request, timeout=60) as stream:
        rest_path = f"/v1/requests/{stream.headers['x-headway-request-id']}/events"
        headers = {"x-headway-resume": stream.headers["x-headway-resume"]}
        lines = stream.iter_lines()
        while sum(map(len, told(seen).values())) < 60:
            line = next(lines)
            seen += f"{line}\n"
            if line.startswith("id: "):
                last_id = line.removeprefix("id: ")
                seen += f"{next(lines)}\n{next(lines)}\n"  # all of an event belongs to its id
        stack.gateway.kill()
    stack.start_gateway({})
    headers["Last-Event-ID"] = last_id
    rest = httpx.get(stack.gateway_url + rest_path, headers=headers, timeout=60)
    assert rest.status_code == 200, rest.text
    assert told(seen + rest.text) == expected
    assert len(expected) == body.get("n", 1)


def test_a_repeated_key_gets_the_first_answer(sdk: openai.OpenAI) -> None:
    wish: Any = {"model": MODEL, "prompt": "import", "max_tokens": 8, "temperature": 1}
    key: Any = {"extra_headers": {"Idempotency-Key": "once"}}
    first = sdk.completions.create(**wish, **key)
    assert sdk.completions.create(**wish, **key).choices == first.choices
    streamed = sdk.completions.create(**wish, **key, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == first.choices[0].text
    for changes in ({"prompt": "other"}, {"n": 2}, {"prompt": ["import", "other"]}):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            sdk.completions.create(**{**wish, **changes}, **key)
        assert caught.value.code == "request_id_conflict"
    key = {"extra_headers": {"Idempotency-Key": "several"}}
    wish["prompt"] = ["import", "os"]
    first = sdk.completions.create(**wish, **key)
    assert sdk.completions.create(**wish, **key).choices == first.choices
    for prompts in (["import"], ["os", "import"], ["import", "os", "re"]):
        with pytest.raises(openai.UnprocessableEntityError):
            sdk.completions.create(**{**wish, "prompt": prompts}, **key)


def test_a_call_says_what_it_is_and_how_urgent(sdk: openai.OpenAI) -> None:
    headers = {"x-request-id": "mine", "x-headway-priority": "1", "x-headway-session-id": "s"}
    wish: Any = {"model": MODEL, "messages": HI, "max_tokens": 4}
    limits = {"queue_timeout_s": 30, "execution_timeout_s": 30, "include_timing": True}
    raw = sdk.chat.completions.with_raw_response.create(
        **wish, extra_headers=headers, extra_body=limits
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.http_response.json()["timing"]["num_attempts"] == 1
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(**wish, extra_body={"priority": 99})
    assert caught.value.param == "priority"


def test_failures_are_the_sdks_own_errors(sdk: openai.OpenAI) -> None:
    def ask(**fields: Any) -> None:
        wish: Any = {"model": MODEL, "messages": HI, "max_tokens": 1_000, **fields}
        sdk.chat.completions.create(**wish)

    with pytest.raises(openai.NotFoundError):
        ask(model="none")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(extra_body={"best_of": 2})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "best_of")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(extra_body={"structured_outputs": {"regex": "("}})
    assert caught.value.param == "structured_outputs"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(extra_body={"structured_outputs": {"regex": "a"}, "min_tokens": 5})
    assert caught.value.param == "structured_outputs"
    assert "min_tokens" in caught.value.message
    with pytest.raises(openai.InternalServerError) as late:
        ask(extra_body={"execution_timeout_s": 0.02, "ignore_eos": True})
    assert late.value.status_code == 504


def test_many_streams_of_the_async_client(stack: Stack) -> None:
    async def ask(sdk: openai.AsyncOpenAI, seed: int) -> str:
        stream = await sdk.chat.completions.create(
            model=MODEL, messages=HI, max_tokens=24, temperature=2, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        url = f"{stack.gateway_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as sdk:
            return await asyncio.gather(*(ask(sdk, seed // 2) for seed in range(16)))

    texts = asyncio.run(ask_all())
    assert texts[::2] == texts[1::2]
    assert len(set(texts)) > 1
