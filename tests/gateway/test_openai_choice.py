"""One sample: the same answer however its tokens come, and from wherever it is continued."""

import functools
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_http.core.messages import Tokens
from gateway_http.model_text import Text
from gateway_http.openai_choice import Choice, Delta, ReplySpec
from gateway_http.reply import Piece, ReplyFormat, merged
from gateway_http.settings import GatewaySettings
from gateway_http.text import Vocabulary
from gateway_http.text_pool import ModelFiles, TextPool
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.test_reply import F, G

FORMS = [
    ReplyFormat(),
    ReplyFormat(reasoning="think", tools="hermes"),
    ReplyFormat(tools="llama3"),
    ReplyFormat(reasoning="think", is_thinking=True),
]
WORDS = st.lists(
    st.sampled_from(
        [
            *("ü", "🙂", "the queue", "ST", "STOP", " ", "\n", "<|end|>"),
            *("<think>", "</think>", f"<tool_call>{F}</tool_call>", G),
        ]
    ),
    max_size=8,
).map("".join)


@functools.cache
def model_text() -> Text:
    vocabulary = Vocabulary(tiny_model.tokenizer().to_str().encode())
    pool = TextPool(GatewaySettings(num_text_workers=0))
    return Text(tiny_model.card(), ModelFiles("tiny", vocabulary), pool)


def spec(form: ReplyFormat) -> ReplySpec:
    return ReplySpec(kind="chat", model="m", created=1, stop_strings=["STOP"], form=form)


def deltas(
    form: ReplyFormat, token_ids: list[int], cuts: list[int], num_skipped: int = 0
) -> list[Delta]:
    """What comes of tokens that arrive in the pieces that the cuts make."""
    choice = Choice(spec(form), model_text(), num_skipped=num_skipped)
    out = []
    bounds = sorted({0, len(token_ids), *cuts})
    for start, end in pairwise(bounds):
        ids = token_ids[start:end]
        tops = [one for token_id in ids for one in (token_id, token_id + 1)]
        values = [-float(one) for one in ids]
        out.append(choice.push(Tokens(0, start, ids, values, tops, [-0.5, -1.5] * len(ids))))
    reason = generation_pb2.FINISH_REASON_STOP
    out.append(choice.finish(generation_pb2.SequenceEnd(reason=reason)))
    return out


def added_up(parts: list[Delta]) -> tuple[str, list[Piece], list[int], list[float], list[int]]:
    whole = Delta()
    for part in parts:
        whole.extend(part)
    tokens = (whole.token_ids, whole.logprobs, whole.top_token_ids)
    return whole.text, merged(whole.pieces), *tokens


@settings(max_examples=300, deadline=None)
@given(WORDS, st.sampled_from(FORMS), st.lists(st.integers(0, 80), max_size=6))
def test_an_answer_does_not_depend_on_how_its_tokens_come(
    text: str, form: ReplyFormat, cuts: list[int]
) -> None:
    token_ids = tiny_model.encode(text)
    cuts = [cut for cut in cuts if cut < len(token_ids)]
    assert added_up(deltas(form, token_ids, cuts)) == added_up(deltas(form, token_ids, []))


@settings(max_examples=300, deadline=None)
@given(WORDS, st.sampled_from(FORMS), st.data())
def test_what_was_seen_and_what_follows_are_the_whole(
    text: str, form: ReplyFormat, data: st.DataObject
) -> None:
    token_ids = tiny_model.encode(text)
    num_seen = data.draw(st.integers(0, len(token_ids)))
    cuts = data.draw(st.lists(st.integers(0, len(token_ids)), max_size=4))
    every = list(range(len(token_ids)))
    seen = deltas(form, token_ids, every)[:num_seen]
    rest = deltas(form, token_ids, cuts, num_seen)
    assert added_up(seen + rest) == added_up(deltas(form, token_ids, []))


@pytest.mark.parametrize("form", FORMS)
def test_a_reply_ends_with_its_reason(form: ReplyFormat) -> None:
    last = deltas(form, tiny_model.encode(f"<tool_call>{F}</tool_call>"), [])[-1]
    assert last.finish_reason == ("tool_calls" if form.tools == "hermes" else "stop")
    named = ReplySpec(kind="chat", model="m", created=1, form=form, has_call_reason=False)
    choice = Choice(named, model_text())
    choice.push(Tokens(0, 0, tiny_model.encode(G), []))
    end = generation_pb2.SequenceEnd(reason=generation_pb2.FINISH_REASON_STOP)
    assert choice.finish(end).finish_reason == "stop"
