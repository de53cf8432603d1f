"""Where structured output ends, and that it goes on the same wherever it runs."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from executor_svc.core.engine import FinishReason, Grammar, InvalidLeaseError, SamplingParams
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.token_bytes import TokenBytes
from headway.reasons import Reason
from tests.engine.driving import build, lease, only, run
from tests.engine.grammars import (
    JSON_OBJECT,
    PROMPT,
    SCHEMA,
    choice,
    complete_texts,
    json_schema,
    params_for,
    regex,
)


def test_stop_tokens_end_complete_texts_only(
    shared_engine: TorchEngine, pieces: TokenBytes
) -> None:
    """A stop token that is an ordinary token is not text then; EOS counts no more if ignored."""
    stop = next(token for token in range(3, 259) if pieces[token] == b"c")
    grammar = regex("[a-d]{3}")
    record = run(
        shared_engine,
        *(
            lease(seed, PROMPT, params_for(grammar, seed, ignore_eos=True, stop_token_ids=(stop,)))
            for seed in range(20)
        ),
    )
    texts = complete_texts(record, pieces)
    assert len(texts) == 20
    assert all(re.fullmatch("[abd]{3}", text) for text in texts.values())
    assert {end.stop_token_id for end in record.ends.values()} == {stop}


def test_some_token_has_to_end_it(shared_engine: TorchEngine) -> None:
    with pytest.raises(InvalidLeaseError, match="no token may end") as caught:
        shared_engine.add(lease(0, PROMPT, params_for(regex("a"), ignore_eos=True)))
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert not shared_engine.has_work()


def test_min_tokens_delay_the_end(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    leases = [lease(i, PROMPT, params_for(regex("[ab]*"), i, min_tokens=30)) for i in range(10)]
    record = run(shared_engine, *leases)
    for end in record.ends.values():
        assert end.num_tokens > 30
    assert all(re.fullmatch("[ab]*", text) for text in complete_texts(record, pieces).values())


def test_a_text_that_is_complete_before_min_tokens_is_an_error(shared_engine: TorchEngine) -> None:
    short = lease(0, PROMPT, params_for(regex("abc"), min_tokens=5))
    record = run(shared_engine, short, lease(1, PROMPT, SamplingParams(max_tokens=9)))
    assert record.failures[0].reason is Reason.INVALID_REQUEST
    assert "min_tokens" in record.failures[0].message, "the client is told"
    assert record.ends.keys() == {1}


def test_stop_strings_end_a_text_anywhere(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    """Whoever gives one wants no more than what is before it."""
    grammar = regex("[ab]{30}")
    record = run(shared_engine, lease(0, PROMPT, params_for(grammar, stop_strings=("ab", "ba"))))
    text = b"".join(pieces[token] for token in record.tokens[0])
    assert record.ends[0].stop_string in ("ab", "ba")
    assert re.fullmatch("a+b|b+a", text.decode())


def test_length_may_cut_a_text(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    record = run(shared_engine, lease(0, PROMPT, params_for(regex("a{50}"), max_tokens=4)))
    assert record.ends[0].reason is FinishReason.LENGTH
    assert set(b"".join(pieces[token] for token in record.tokens[0])) == set(b"a")


@pytest.mark.parametrize(
    "grammar", [regex(r"[^\s\S]"), regex(r"ab[^\s\S]"), json_schema({"$ref": "#"})]
)
def test_a_dead_end_ends_its_lease_only(shared_engine: TorchEngine, grammar: Grammar) -> None:
    whole = run(shared_engine, lease(1, PROMPT, SamplingParams(max_tokens=9, seed=4)))
    record = run(
        shared_engine,
        lease(0, PROMPT, params_for(grammar)),
        lease(1, PROMPT, SamplingParams(max_tokens=9, seed=4)),
    )
    assert record.failures[0].reason is Reason.INVALID_REQUEST
    assert "dead end" in record.failures[0].message
    assert record.tokens[1] == whole.tokens[1]


@pytest.mark.parametrize(
    ("grammar", "fields"),
    [
        (json_schema(SCHEMA), {}),
        (JSON_OBJECT, {"max_tokens": 40}),
        (regex("([a-e]{1,3} ?){2,9}"), {"min_tokens": 6, "presence_penalty": 1.0}),
        (choice("yes", "no", "no way"), {"temperature": 0.0}),
    ],
    ids=str,
)
def test_another_engine_goes_on_at_any_index(
    qwen3: Path, grammar: Grammar, fields: dict[str, Any]
) -> None:
    params = params_for(grammar, 3, **fields)
    whole = run(build(qwen3), lease(0, PROMPT, params))
    tokens = whole.tokens[0]
    other = build(qwen3, max_num_seqs=4, max_num_batched_tokens=16, enable_prefix_caching=False)
    rest = run(
        other,
        *(lease(held, PROMPT, params, generated=(tokens[:held],)) for held in range(len(tokens))),
    )
    for held in range(len(tokens)):
        assert rest.tokens[held] == tokens[held:]
        assert rest.logprobs[held] == whole.logprobs[0][held:]
        assert rest.ends[held] == replace(whole.ends[0], key=held)


def test_samples_and_preemption(qwen3: Path, pieces: TokenBytes) -> None:
    params = params_for(json_schema(SCHEMA), 8)
    roomy = run(build(qwen3), lease(0, PROMPT, params, num_samples=5))
    tight_engine = build(qwen3, num_blocks=16, block_size=8)
    tight = run(tight_engine, lease(0, PROMPT, params, num_samples=5))
    assert only(tight_engine)._batcher.num_preemptions >= 1
    assert roomy.tokens == tight.tokens
    texts = complete_texts(roomy, pieces)
    assert len(set(texts.values())) > 1
    for text in texts.values():
        jsonschema_rs.validator_for(SCHEMA).validate(json.loads(text))


def test_plain_rows_do_not_notice(shared_engine: TorchEngine) -> None:
    plain = lease(0, PROMPT, SamplingParams(max_tokens=12, seed=2))
    alone = run(shared_engine, plain)
    among = run(shared_engine, lease(1, PROMPT, params_for(regex("[ab]*"))), plain)
    assert (among.tokens[0], among.logprobs[0]) == (alone.tokens[0], alone.logprobs[0])


def test_text_that_does_not_fit_cannot_be_continued(
    shared_engine: TorchEngine, pieces: TokenBytes
) -> None:
    """Only an executor that does not mask could have made it."""
    z = next(token for token in range(3, 259) if pieces[token] == b"z")
    record = run(shared_engine, lease(0, PROMPT, params_for(regex("[a-c]*")), generated=([z],)))
    assert record.failures[0].reason is Reason.INVALID_REQUEST
