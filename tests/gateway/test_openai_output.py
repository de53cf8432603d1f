"""Whole answers with very many logprobs: complete, and others have their turns meanwhile."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from gateway_http.openai_choice import Delta, Kind, ReplySpec
from gateway_http.openai_logprobs import chat_logprobs, completion_logprobs
from gateway_http.openai_output import ChatFormat, CompletionFormat, Format
from gateway_http.openai_responses_output import ResponsesFormat
from gateway_http.openai_usage import Outcome
from tests.gateway.texts import loaded
from tests.gateway.turns import turns_during

NUM_TOKENS = 1_000
NUM_TOP = 3
MOST_TOKENS_AT_ONCE = 100


def long_delta(*, has_prompt: bool) -> Delta:
    """As behind an echo: the first token of a prompt has neither logprob nor alternatives."""
    num_rows = NUM_TOKENS - has_prompt
    token_ids = [number % 50 for number in range(NUM_TOKENS)]
    logprobs = [-float(number) for number in range(NUM_TOKENS)]
    if has_prompt:
        logprobs[0] = math.nan
    return Delta(
        "x" * NUM_TOKENS,
        token_ids=token_ids,
        logprobs=logprobs,
        top_token_ids=[number % 47 for number in range(num_rows * NUM_TOP)],
        top_logprobs=[-float(number) for number in range(num_rows * NUM_TOP)],
        text_offsets=list(range(NUM_TOKENS)),
        finish_reason="stop",
    )


def of_choices(body: Any) -> list[Any]:
    return [choice["logprobs"] for choice in body["choices"]]


def of_message(body: Any) -> list[Any]:
    return [{"content": body["output"][0]["content"][0]["logprobs"], "refusal": None}]


@pytest.mark.parametrize(
    ("make", "kind", "found_in", "num_choices"),
    [
        (ChatFormat, "chat", of_choices, 2),
        (CompletionFormat, "completion", of_choices, 2),
        (ResponsesFormat, "response", of_message, 1),
    ],
)
async def test_logprobs_of_a_whole_answer_hold_nobody_up(
    make: Callable[..., Format],
    kind: Kind,
    found_in: Callable[[Any], list[Any]],
    num_choices: int,
) -> None:
    text = await loaded()
    spec = ReplySpec(kind=kind, model="m", created=1, num_samples=num_choices, wants_logprobs=True)
    delta = long_delta(has_prompt=kind == "completion")
    deltas = [delta] * num_choices
    num_turns, body = await turns_during(make("r", spec, text).body(deltas, Outcome()))
    assert num_turns >= num_choices * NUM_TOKENS // MOST_TOKENS_AT_ONCE
    arrays = (delta.token_ids, delta.logprobs, delta.top_token_ids, delta.top_logprobs)
    expected: Any = {"content": chat_logprobs(text, *arrays), "refusal": None}
    if kind == "completion":
        expected = completion_logprobs(text, *arrays, delta.text_offsets)
    assert found_in(json.loads(body)) == [expected] * num_choices


async def test_an_answer_without_tokens_has_empty_logprobs() -> None:
    text = await loaded()
    spec = ReplySpec(kind="chat", model="m", created=1, wants_logprobs=True)
    body = await ChatFormat("r", spec, text).body([Delta(finish_reason="stop")], Outcome())
    assert json.loads(body)["choices"][0]["logprobs"] == {"content": [], "refusal": None}
