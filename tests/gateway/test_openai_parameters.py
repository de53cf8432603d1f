"""Parameters of chats and completions: those that are taken, and those that are refused by name."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway_http.openai_chat_schema import ChatRequest, DetokenizeRequest, TokenizeRequest
from gateway_http.openai_responses_schema import ResponsesRequest
from gateway_http.openai_schema import CompletionRequest
from tests.gateway import tiny_model
from tests.gateway.scripted import ScriptedScheduler

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": tiny_model.NAME, "prompt": "Hi", "max_tokens": 200}


@pytest.mark.parametrize(
    "body", [ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest]
)
def test_the_document_names_every_parameter(body: Any) -> None:
    """docs/openai.md says that what it does not name is refused."""
    document = Path(__file__).parents[2] / "docs" / "openai.md"
    words = set(re.findall(r"\w+", document.read_text(encoding="utf-8")))
    assert {*body.__struct_fields__, *body.harmless} <= words


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
