"""What clients, drivers and bad luck can do to an engine; afterwards no block is lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.core.engine import (
    InvalidLeaseError,
    LeaseRequest,
    PromptScoring,
    SamplingParams,
    StepOutput,
)
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.models.decoder import Decoder
from headway.reasons import Reason
from tests.engine.driving import Record, build, lease, only, run

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True, seed=5)
PROMPT = [(13 * i) % 300 + 3 for i in range(60)]


def small(folder: Path, **settings: Any) -> TorchEngine:
    """16 blocks of 8 tokens, 20 tokens a step."""
    usual = {"num_blocks": 16, "block_size": 8, "max_num_seqs": 8, "max_num_batched_tokens": 20}
    return build(folder, **(usual | settings))


def finish(engine: TorchEngine, record: Record) -> Record:
    """Step to the end; nothing may be left but cached blocks that are free to be taken."""
    while engine.has_work():
        record.take(engine.step())
    model = only(engine)
    blocks = model._batcher.blocks
    assert blocks.num_free == blocks.num_blocks
    assert len(blocks._free) + len(blocks._idle) == blocks.num_blocks
    assert blocks.num_cached == len(blocks._idle)
    assert (model._batcher.num_running, model._batcher.num_waiting) == (0, 0)
    assert not model._rows
    assert not model._fresh
    return record


def assert_works(engine: TorchEngine, folder: Path) -> None:
    """The engine gives what a new one gives, whatever its cache has."""
    record = finish(engine, run(engine, lease(9000, PROMPT, PARAMS, num_samples=2)))
    expected = run(small(folder), lease(9000, PROMPT, PARAMS, num_samples=2))
    assert record.tokens == expected.tokens
    assert record.logprobs == expected.logprobs


# --- too much


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens"), [(129, 1), (119, 10), (1, 128), (5000, 5000)]
)
def test_what_the_cache_can_never_hold_is_refused(
    qwen3: Path, prompt_len: int, max_tokens: int
) -> None:
    engine = small(qwen3)
    with pytest.raises(InvalidLeaseError, match="the context holds 128") as caught:
        engine.add(lease(0, [5] * prompt_len, SamplingParams(max_tokens=max_tokens)))
    assert caught.value.reason is Reason.PROMPT_TOO_LONG
    assert not engine.has_work()
    assert_works(engine, qwen3)


def test_what_just_fits_runs_beside_all_that_does_not(qwen3: Path) -> None:
    engine = small(qwen3)
    full = lease(0, [5] * 118, PARAMS)
    record = finish(engine, run(engine, full, lease(10, PROMPT, PARAMS), lease(20, [6], PARAMS)))
    assert [record.ends[key].num_tokens for key in (0, 10, 20)] == [10, 10, 10]
    assert_works(engine, qwen3)


def test_far_more_requests_than_blocks_all_end(qwen3: Path) -> None:
    engine = small(qwen3, max_num_seqs=20)
    leases = [lease(10 * i, PROMPT[i % 7 : 9 + 2 * (i % 20)], PARAMS) for i in range(60)]
    record = finish(engine, run(engine, *leases))
    assert len(record.ends) == 60
    assert not record.failures
    assert only(engine)._batcher.num_preemptions > 0
    assert_works(engine, qwen3)


def test_many_samples_in_little_memory_all_end(qwen3: Path) -> None:
    engine = small(qwen3, max_num_seqs=20)
    record = finish(engine, run(engine, lease(0, PROMPT, PARAMS, num_samples=30)))
    assert len(record.ends) == 30
    assert len({tuple(tokens) for tokens in record.tokens.values()}) > 20
    assert_works(engine, qwen3)


# --- numbers that are none


def spoil_logits(
    monkeypatch: pytest.MonkeyPatch, is_sick: list[bool], value: float = float("nan")
) -> None:
    """While ``is_sick`` has True, the last row of every step's logits is ``value``."""
    logits = Decoder.logits

    def sick(self: Decoder, hidden: Tensor) -> Tensor:
        out = logits(self, hidden).clone()
        if is_sick[0]:
            out[-1] = value
        return out

    monkeypatch.setattr(Decoder, "logits", sick)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_end_that_lease_only(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    engine, is_sick = small(qwen3), [False]
    whole = run(small(qwen3), lease(0, PROMPT[:10], PARAMS))
    spoil_logits(monkeypatch, is_sick, value)
    record = Record()
    engine.add(lease(0, PROMPT[:10], PARAMS))
    engine.add(lease(10, PROMPT[:9], PARAMS))
    for step in range(4):
        is_sick[0] = step == 3
        record.take(engine.step())
    is_sick[0] = False
    finish(engine, record)
    assert record.failures.keys() == {10}
    assert record.failures[10].reason is Reason.INTERNAL
    assert "finite" in record.failures[10].detail
    assert record.tokens[0] == whole.tokens[0]
    assert_works(engine, qwen3)


def test_blocks_of_a_sick_lease_are_not_offered_to_others(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A passing fault of the device must not stay in the cache."""
    engine = small(qwen3)
    forward = Decoder.forward

    def sick(self: Decoder, *args: Any) -> Tensor:
        return forward(self, *args) * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", sick)
        record = finish(engine, run(engine, lease(0, PROMPT, PARAMS)))
    assert record.failures.keys() == {0}
    healthy = finish(engine, run(engine, lease(10, PROMPT, PARAMS)))
    assert healthy.num_cached == {10: 0}
    assert_works(engine, qwen3)


# --- going away


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_cancelled_in_prefill(qwen3: Path, num_steps: int) -> None:
    """60 tokens take three steps; what was computed stays in the cache."""
    engine, record = small(qwen3), Record()
    engine.add(lease(0, PROMPT, PARAMS))
    for _ in range(num_steps):
        record.take(engine.step())
    assert bool(record.tokens) == (num_steps == 3)
    engine.abort(0)
    finish(engine, record)
    again = finish(engine, run(engine, lease(10, PROMPT, PARAMS)))
    assert again.num_cached == {10: (0, 16, 40, 56)[num_steps]}
    assert_works(engine, qwen3)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4])
def test_cancelled_while_samples_wait_for_their_prompt(qwen3: Path, num_steps: int) -> None:
    engine, record = small(qwen3), Record()
    engine.add(lease(0, PROMPT, PARAMS, num_samples=5))
    engine.add(lease(10, PROMPT[30:], PARAMS))
    for _ in range(num_steps):
        record.take(engine.step())
        assert (only(engine)._batcher.num_waiting >= 4) == (record.num_steps < 4)
    engine.abort(0)
    finish(engine, record)
    assert record.tokens.keys() & set(range(5)) <= set(record.tokens)
    assert record.ends.keys() == {10}
    assert_works(engine, qwen3)


def test_cancelled_while_preempted(qwen3: Path) -> None:
    engine, record = small(qwen3, num_blocks=12, max_num_batched_tokens=80), Record()
    for key in (0, 10):
        engine.add(lease(key, PROMPT[key : key + 40], SamplingParams(20, ignore_eos=True)))
    batcher = only(engine)._batcher
    record.take(engine.step())
    while not batcher.num_waiting:
        record.take(engine.step())
    assert batcher.num_preemptions == 1
    assert (batcher.num_running, batcher.num_waiting) == (1, 1)
    engine.abort(10)
    finish(engine, record)
    assert record.ends.keys() == {0}
    assert_works(engine, qwen3)


def test_everything_cancelled_at_every_step(qwen3: Path) -> None:
    """Leases that preempt each other, all aborted after 0, 3, 6... steps."""
    engine = small(qwen3, max_num_batched_tokens=64)
    for num_steps in range(0, 25, 3):
        record = Record()
        for key in (0, 10, 20, 30):
            engine.add(lease(key, PROMPT[key : key + 25], PARAMS, num_samples=3))
        for _ in range(num_steps):
            record.take(engine.step())
        for key in (20, 0, 30, 10):
            engine.abort(key)
        finish(engine, record)
    assert only(engine)._batcher.num_preemptions > 0
    assert_works(engine, qwen3)


def test_cancelled_while_its_prompt_is_scored(qwen3: Path) -> None:
    engine, record = small(qwen3), Record()
    scoring = PromptScoring(wants_logprobs=True)
    engine.add(lease(0, PROMPT, PARAMS, num_samples=2, scoring=scoring))
    record.take(engine.step())
    engine.abort(0)
    finish(engine, record)
    output = StepOutput()
    engine.add(lease(10, PROMPT, PARAMS, scoring=scoring))
    while engine.has_work():
        step = engine.step()
        output.prompt_scores += step.prompt_scores
    (scores,) = output.prompt_scores
    assert len(scores.logprob) == len(PROMPT)  # though the cache had the first ones
    assert_works(engine, qwen3)


# --- drivers


@pytest.mark.parametrize(
    "second",
    [
        lease(0, PROMPT[:3], PARAMS),
        lease(2, PROMPT[:3], PARAMS),
        lease(2, PROMPT[:3], PARAMS, num_samples=3),
    ],
    ids=["same key", "key of a sample", "samples that meet"],
)
def test_a_key_that_is_taken_is_our_own_fault_and_harms_nobody(
    qwen3: Path, second: LeaseRequest
) -> None:
    engine, record = small(qwen3), Record()
    engine.add(lease(0, PROMPT[:20], PARAMS, num_samples=4))
    record.take(engine.step())
    with pytest.raises(AssertionError):
        engine.add(second)
    finish(engine, record)
    assert record.ends.keys() == {0, 1, 2, 3}
    assert_works(engine, qwen3)


def test_a_step_that_raises_halfway_leaves_nothing_behind(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is tried again chunk by chunk; the cache has only what was computed."""
    engine = small(qwen3, max_num_batched_tokens=100)
    forward = Decoder.forward

    def out_of_memory(self: Decoder, token_ids: Tensor, *rest: Any) -> Tensor:
        if 299 in token_ids.tolist():
            raise torch.OutOfMemoryError("no memory for this one")
        return forward(self, token_ids, *rest)

    monkeypatch.setattr(Decoder, "forward", out_of_memory)
    bad = [*PROMPT[:30], 299]
    record = finish(engine, run(engine, lease(0, PROMPT, PARAMS), lease(10, bad, PARAMS)))
    assert record.failures.keys() == {10}
    assert "no memory" in record.failures[10].detail
    assert record.ends[0].num_tokens == 10
    monkeypatch.undo()
    assert_works(engine, qwen3)
