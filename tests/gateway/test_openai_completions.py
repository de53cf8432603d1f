"""Completions that tell their prompt, and /tokenize and /detokenize."""

from typing import Any

import httpx
import pytest

from tests.gateway import tiny_model
from tests.gateway.chats import TEMPLATE, WEATHER, events, says
from tests.gateway.scripted import ScriptedScheduler

PATH = "/v1/completions"


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": tiny_model.NAME, "prompt": "the 🙂", "max_tokens": 99, **fields}


async def test_an_echo_is_the_prompt_and_what_follows(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says(" fleet")
    token_ids = tiny_model.encode("the 🙂")
    for prompt in ("the 🙂", token_ids, ["the 🙂"], [token_ids]):
        choices = (await asgi.post(PATH, json=completion(prompt=prompt, echo=True, n=2))).json()
        assert [one["text"] for one in choices["choices"]] == ["the 🙂 fleet"] * 2
        response = await asgi.post(PATH, json=completion(prompt=prompt, echo=True, stream=True))
        streamed = "".join(event["choices"][0]["text"] for event in events(response.text))
        assert streamed == "the 🙂 fleet"
    assert not scheduler.runs[-1].request.HasField("prompt_scoring")


async def test_what_the_model_thinks_of_the_prompt(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says("!")
    prompt = tiny_model.encode("the 🙂")
    body = completion(echo=True, logprobs=2)
    logprobs = (await asgi.post(PATH, json=body)).json()["choices"][0]["logprobs"]
    num_prompt = len(prompt)
    assert logprobs["token_logprobs"][:num_prompt] == [None, *(-i for i in range(1, num_prompt))]
    assert logprobs["token_logprobs"][num_prompt:] == [-0.5, -1.5]
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"]) == num_prompt + 2
    for name, value, tops in zip(
        logprobs["tokens"][1:],
        logprobs["token_logprobs"][1:],
        logprobs["top_logprobs"][1:],
        strict=True,
    ):
        assert tops[name] == value
        assert len(tops) == 2
    assert any(name.startswith("bytes:\\x") for name in logprobs["tokens"])
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[num_prompt] == len("the 🙂")
    scoring = scheduler.runs[-1].request.prompt_scoring
    assert (scoring.logprobs, scoring.top_logprobs) == (True, 2)
    response = await asgi.post(PATH, json={**body, "stream": True})
    chunks = [event["choices"][0] for event in events(response.text)]
    assert chunks[0]["text"] == "the 🙂"
    joined = [value for chunk in chunks for value in chunk["logprobs"]["token_logprobs"]]
    assert joined == logprobs["token_logprobs"]


@pytest.mark.parametrize("num_samples", [1, 2])
async def test_a_prompt_alone_can_be_scored(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler, num_samples: int
) -> None:
    prompts = ["the 🙂", "a"]
    body = completion(prompt=prompts, echo=True, logprobs=1, max_tokens=0, n=num_samples)
    answer = (await asgi.post(PATH, json=body)).json()
    texts = [text for text in prompts for _ in range(num_samples)]
    assert [one["text"] for one in answer["choices"]] == texts
    assert [len(one["logprobs"]["tokens"]) for one in answer["choices"]] == [
        len(tiny_model.encode(text)) for text in texts
    ]
    assert {one["finish_reason"] for one in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0
    assert scheduler.runs[0].request.sampling.max_tokens == 1
    refused = await asgi.post(PATH, json=completion(max_tokens=0))
    assert refused.json()["error"]["param"] == "max_tokens"


async def test_prompts_under_one_key_take_no_other_key(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    """The first has the key itself, so that the same key for another first prompt is a conflict."""
    headers = {"Idempotency-Key": "k"}
    await asgi.post(PATH, json=completion(prompt=["a", "b", "c"]), headers=headers)
    first, *others = (run.request.idempotency_key for run in scheduler.runs)
    assert first == "k"
    assert len(set(others)) == 2
    for other in others:
        with pytest.raises(UnicodeEncodeError):
            other.encode("latin-1")  # as headers are written


async def test_alternatives_of_generated_tokens(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = says("ok")
    answer = (await asgi.post(PATH, json=completion(logprobs=3))).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["text_offset"][0] == 0
    for name, value, tops in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert tops[name] == value
        assert 3 <= len(tops) <= 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": ["a"] * 65}, "prompt"), ({"prompt": ["a"] * 5, "n": 64}, "n")],
)
async def test_prompts_and_samples_are_bounded_together(
    asgi: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await asgi.post(PATH, json=completion(**fields))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_timings_of_several_prompts(asgi: httpx.AsyncClient) -> None:
    answer = (await asgi.post(PATH, json=completion(prompt=["a", "b"], include_timing=True))).json()
    assert [one["total_s"] for one in answer["timing"]] == [1.5, 1.5]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


async def test_text_to_tokens_and_back(asgi: httpx.AsyncClient) -> None:
    body = {"model": tiny_model.NAME, "prompt": "the 🙂", "return_token_strs": True}
    answer = (await asgi.post("/tokenize", json=body)).json()
    assert answer["tokens"] == tiny_model.encode("the 🙂")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == tiny_model.CONTEXT
    assert answer["token_strs"][0] == "the"
    back = {"model": tiny_model.NAME, "tokens": [*answer["tokens"], tiny_model.eos_id()]}
    assert (await asgi.post("/detokenize", json=back)).json() == {"prompt": "the 🙂<|end|>"}
    long = {"model": tiny_model.NAME, "prompt": "the " * 1000}
    assert (await asgi.post("/tokenize", json=long)).json()["count"] > tiny_model.CONTEXT


async def test_where_one_model_is_served_tokens_need_no_name(
    asgi: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    bodies = {"/tokenize": {"prompt": "the"}, "/detokenize": {"tokens": [1]}}
    for models, status in (([], 503), ([tiny_model.NAME], 200), (scheduler.models, 400)):
        scheduler.models = models
        for path, body in bodies.items():
            response = await asgi.post(path, json=body)
            assert response.status_code == status
            assert status != 400 or response.json()["error"]["param"] == "model"


async def test_a_chat_to_tokens(asgi: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "Hi"}]
    for fields in (
        {},
        {"tools": [WEATHER]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": False},
    ):
        body = {"model": tiny_model.NAME, "messages": messages, **fields}
        tokens = (await asgi.post("/tokenize", json=body)).json()["tokens"]
        await asgi.post("/v1/chat/completions", json=body)
        assert tokens == list(scheduler.runs[-1].request.prompt_token_ids)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": [WEATHER]}, "tools"),
        ("/tokenize", {"prompt": 7}, "prompt"),
        ("/tokenize", {"prompt": "x", "no_such": 1}, "no_such"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [1] * 1000}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
async def test_what_tokenizing_refuses(
    asgi: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await asgi.post(path, json={"model": tiny_model.NAME, **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
