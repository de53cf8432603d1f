"""The engine without a model: its tokens are what mock_tokens says, in order, for everybody."""

import time
from dataclasses import replace

import pytest

from executor_svc.core.engine import (
    FinishReason,
    InvalidLeaseError,
    LeaseRequest,
    SamplingParams,
    SequenceEnd,
    StepOutput,
)
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.mock_formulas import mock_tokens
from headway.reasons import Reason

VOCAB = 100


def engine(**changes: object) -> MockEngine:
    fields = {"step_ms": 0.0, "vocab_size": VOCAB, "num_slots": 4} | changes
    return MockEngine(MockConfig(**fields))  # type: ignore[arg-type]


def lease(key: int, prompt: tuple[int, ...] = (1, 2), **params: object) -> LeaseRequest:
    fields = {"max_tokens": 5, "seed": 7} | params
    return LeaseRequest(key, "mock", prompt, SamplingParams(**fields))  # type: ignore[arg-type]


def drain(mock: MockEngine) -> tuple[dict[int, list[int]], dict[int, SequenceEnd]]:
    """Run to the end; tokens and ends by sequence key. Indexes must be without gaps."""
    tokens: dict[int, list[int]] = {}
    starts: dict[int, int] = {}
    ends: dict[int, SequenceEnd] = {}
    while mock.has_work():
        output: StepOutput = mock.step()
        for key, index, token_id, logprob in zip(
            output.key, output.index, output.token_id, output.logprob, strict=True
        ):
            assert index == starts.setdefault(key, index) + len(tokens.setdefault(key, []))
            assert logprob == -(token_id % 1024) / 1024
            assert key not in ends
            tokens[key].append(token_id)
        for end in output.ends:
            assert end.key not in ends
            ends[end.key] = end
    return tokens, ends


def expected(prompt: tuple[int, ...] = (1, 2), sample: int = 0, stop: int = 5) -> list[int]:
    return mock_tokens(prompt, seed=7, sample=sample, start=0, stop=stop, vocab_size=VOCAB)


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_many_leases_of_different_length_share_few_slots(tokens_per_step: int) -> None:
    mock = engine(tokens_per_step=tokens_per_step)
    for key in range(10):
        mock.add(lease(key, (key,), max_tokens=key + 1))
    tokens, ends = drain(mock)
    for key in range(10):
        assert tokens[key] == expected((key,), stop=key + 1)
        assert ends[key] == SequenceEnd(key, key + 1, FinishReason.LENGTH)


def test_samples_and_seeds_differ_and_eos_never_comes() -> None:
    mock = engine()
    request = lease(0, max_tokens=200)
    mock.add(LeaseRequest(0, "mock", (1, 2), request.params, num_samples=2))
    tokens, _ = drain(mock)
    assert tokens == {n: expected(sample=n, stop=200) for n in (0, 1)}
    assert tokens[0] != tokens[1]
    assert VOCAB - 1 not in tokens[0] + tokens[1]


def test_a_resumed_lease_goes_on_exactly_and_ended_samples_rest() -> None:
    mock = engine()
    whole = expected()
    mock.add(
        LeaseRequest(
            0,
            "mock",
            (1, 2),
            lease(0).params,
            num_samples=3,
            generated=(whole[:3], [9], expected(sample=2)),
            ended=frozenset({1}),
        )
    )
    tokens, ends = drain(mock)
    assert tokens == {0: whole[3:]}
    assert sorted(ends) == [0, 2]  # sample 2 was complete, only its end was missing
    assert ends[2].num_tokens == 5


def test_stop_tokens_end_a_sample_but_not_before_min_tokens() -> None:
    stop = expected()[2]
    mock = engine()
    mock.add(lease(0, stop_token_ids=(stop,)))
    mock.add(lease(1, stop_token_ids=(stop,), min_tokens=4))
    tokens, ends = drain(mock)
    assert tokens == {0: expected()[:3], 1: expected()}
    assert ends[0] == SequenceEnd(0, 3, FinishReason.STOP, stop_token_id=stop)
    assert ends[1].reason is FinishReason.LENGTH


def test_eos_comes_where_it_is_asked_for() -> None:
    mock = engine(eos_after_tokens=2)
    mock.add(lease(0))
    mock.add(lease(1, ignore_eos=True))
    mock.add(lease(2, max_tokens=1))
    tokens, ends = drain(mock)
    eos = VOCAB - 1
    assert tokens == {0: [expected()[0], eos], 1: expected(), 2: expected()[:1]}
    assert ends[0] == SequenceEnd(0, 2, FinishReason.STOP, stop_token_id=eos)
    assert ends[2].reason is FinishReason.LENGTH
    # An attempt that drew it, and was lost before it could say so, is over all the same.
    mock.add(replace(lease(0), generated=((expected()[0], eos),)))
    assert drain(mock) == ({}, {0: ends[0]})


def test_aborted_leases_are_silent_whether_they_ran_or_waited() -> None:
    mock = engine(num_slots=2)
    for key in range(4):
        mock.add(lease(key))
    mock.step()
    for key in (0, 3, 9):
        mock.abort(key)
    tokens, ends = drain(mock)
    assert tokens == {1: expected()[1:], 2: expected()}
    assert sorted(ends) == [1, 2]
    mock.add(lease(7))
    mock.close()
    assert not mock.has_work()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (LeaseRequest(0, "other", (1,), SamplingParams(5)), Reason.MODEL_NOT_FOUND),
        (lease(0, ()), Reason.INVALID_REQUEST),
        (lease(0, max_tokens=0), Reason.INVALID_REQUEST),
        (lease(0, max_tokens=1 << 20), Reason.PROMPT_TOO_LONG),
    ],
)
def test_what_it_cannot_run_it_refuses(request_: LeaseRequest, reason: Reason) -> None:
    mock = engine()
    with pytest.raises(InvalidLeaseError) as refusal:
        mock.add(request_)
    assert refusal.value.reason is reason
    assert not mock.has_work()


def test_a_step_takes_its_time_and_prefill_more() -> None:
    mock = engine(step_ms=5.0, prefill_ms_per_1k_tokens=1000.0)
    mock.add(lease(0, (1,) * 20))
    started_s = time.monotonic()
    mock.step()
    assert time.monotonic() - started_s >= 0.025
    mock.step()
    assert time.monotonic() - started_s >= 0.030


def test_models_take_turns_on_the_device() -> None:
    mock = engine(models=("mock", "b", "c"), max_models=1)
    assert mock.max_models == 1
    assert [(m.name, m.is_resident, m.load_ms) for m in mock.models] == [
        ("mock", True, 0),
        ("b", False, 0),
        ("c", False, 0),
    ]
    assert mock.load("c", ("mock",)) >= 0
    assert [m.name for m in mock.models if m.is_resident] == ["c"]
    mock.add(replace(lease(1), model="c"))
    assert drain(mock)[0][1] == expected()
    with pytest.raises(AssertionError):
        mock.add(lease(2))
    with pytest.raises(InvalidLeaseError):
        mock.add(replace(lease(2), model="x"))


def test_all_models_are_resident_unless_a_limit_is_set() -> None:
    mock = engine(models=("mock", "b"))
    assert mock.max_models == 2
    assert all(model.is_resident for model in mock.models)
    assert engine(max_models=5).max_models == 1


def test_a_load_takes_its_time() -> None:
    mock = engine(models=("mock", "b"), max_models=1, load_ms=30)
    assert mock.models[1].load_ms == 30
    assert mock.load("b", ("mock",)) >= 30
