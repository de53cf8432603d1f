"""Steps that are planned while the one before runs give what steps one after the other give.

On the CPU a launched step has been computed, but nothing here can tell: its tokens are pending all
the same until it is taken in.
"""

import random
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import pytest

from executor_svc.core.batcher import Chunk
from executor_svc.core.engine import (
    Grammar,
    GrammarKind,
    LeaseRequest,
    PromptScoring,
    SamplingParams,
)
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.host_step import PENDING
from executor_svc.torch_engine.runner import Launched
from executor_svc.torch_engine.sampler import Row
from tests.engine.driving import Record, build, lease, only, run

PROMPT = [(7 * i) % 300 + 3 for i in range(60)]
WORD = Grammar(GrammarKind.REGEX, ("[a-f]{3,9}",))
TIGHT = {"num_blocks": 30, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 23}


def overlapping(folder: Path, **settings: Any) -> TorchEngine:
    return build(folder, **{"overlap_scheduling": True, "exact_mode": False} | settings)


def one_by_one(folder: Path, **settings: Any) -> TorchEngine:
    return build(folder, **{"overlap_scheduling": False, "exact_mode": False} | settings)


def plain_leases() -> list[LeaseRequest]:
    """All that needs no text: draws, cuts, every kind of stop, alternatives, scores, samples."""
    params = [
        SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=20, seed=1, top_p=0.9, top_k=40, min_p=0.01),
        SamplingParams(max_tokens=20, seed=2, stop_token_ids=tuple(range(100, 130))),
        SamplingParams(max_tokens=20, seed=3, stop_strings=("a", "e", "th"), min_tokens=4),
        SamplingParams(max_tokens=1, seed=4),
        SamplingParams(max_tokens=9, seed=5, top_logprobs=3, ignore_eos=True),
    ]
    leases = [lease(10 * i, PROMPT[i : 5 + 9 * i], each) for i, each in enumerate(params)]
    leases.append(lease(100, PROMPT[:21], params[1], num_samples=3))
    scoring = PromptScoring(wants_logprobs=True, top_logprobs=2, num_alternatives=1)
    leases.append(lease(200, PROMPT[:30], params[0], scoring=scoring))
    leases.append(lease(300, PROMPT[:8], params[1], generated=((5, 6, 7),)))
    return leases


def leases_that_need_text() -> list[LeaseRequest]:
    free: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    return [
        lease(500, PROMPT[:9], SamplingParams(seed=6, repetition_penalty=1.3, **free)),
        lease(510, PROMPT[:9], SamplingParams(seed=7, frequency_penalty=0.7, **free)),
        lease(520, PROMPT[:9], SamplingParams(max_tokens=12, seed=8, grammar=WORD)),
    ]


def test_on_a_cpu_steps_do_not_overlap_unless_told(qwen3: Path) -> None:
    for settings, expected in (({}, 1), ({"overlap_scheduling": True}, 0)):
        engine = build(qwen3, **settings)
        engine.add(lease(0, PROMPT))
        assert len(engine.step().key) == expected


def test_results_come_a_step_later_and_a_token_at_a_time(qwen3: Path) -> None:
    engine = overlapping(qwen3)
    engine.add(lease(0, PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)))
    steps = [engine.step() for _ in range(4)]
    assert [len(output.key) for output in steps] == [0, 1, 1, 1]
    assert not engine.has_work()


@pytest.mark.parametrize("settings", [{}, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("needs_text", [False, True], ids=["plain", "with text"])
def test_the_outcome_is_the_same(
    qwen3: Path, settings: dict[str, Any], *, needs_text: bool
) -> None:
    leases = plain_leases() + (leases_that_need_text() if needs_text else [])
    wanted = run(one_by_one(qwen3, **settings), *leases)
    engine = overlapping(qwen3, **settings)
    assert_same(run(engine, *leases), wanted)
    assert engine.num_preemptions > 0 or settings is not TIGHT
    # What the first round left in the cache is sound.
    assert_same(run(engine, *leases), wanted)


def assert_same(ours: Record, wanted: Record) -> None:
    for name in ("tokens", "logprobs", "indices", "ends", "failures"):
        assert getattr(ours, name) == getattr(wanted, name), name
    assert repr(ours.scores) == repr(wanted.scores)  # the first token's is no number
    # Steps in which nobody asks for alternatives say nothing about them.
    asked = [{key: tops for key, tops in r.tops.items() if any(tops)} for r in (ours, wanted)]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("seed", range(6))
def test_leases_that_come_and_go_at_any_time(qwen3: Path, seed: int) -> None:
    draw = random.Random(seed)
    leases = plain_leases() + leases_that_need_text()
    draw.shuffle(leases)
    wanted = run(one_by_one(qwen3), *leases)
    engine = overlapping(qwen3, **TIGHT)
    record, waiting, running = Record(), list(leases), list[int]()
    aborted: set[int] = set()
    while waiting or engine.has_work():
        while waiting and draw.random() < 0.4:
            running.append(waiting[-1].key)
            engine.add(waiting.pop())
        if running and draw.random() < 0.05:
            key = draw.choice(running)
            engine.abort(key)
            aborted |= set(range(key, key + 10))
        output = engine.step()
        told = {*output.key, *(end.key for end in output.ends)}
        assert not told & {key for key in aborted if key not in record.ends}
        record.take(output)
    for key, tokens in wanted.tokens.items():
        if key not in aborted:
            assert record.tokens[key] == tokens
            assert record.logprobs[key] == wanted.logprobs[key]
            assert record.ends[key] == wanted.ends[key]
        else:
            assert tokens[: len(record.tokens.get(key, ()))] == record.tokens.get(key, [])
    blocks = only(engine)._batcher.blocks
    assert blocks.num_free == blocks.num_blocks


def test_a_key_may_be_used_again_while_its_last_step_is_in_flight(qwen3: Path) -> None:
    params = SamplingParams(max_tokens=6, seed=9, ignore_eos=True)
    wanted = run(one_by_one(qwen3), lease(0, PROMPT[:7], params))
    engine = overlapping(qwen3)
    engine.add(lease(0, PROMPT, params))
    for _ in range(3):
        engine.step()
    engine.abort(0)
    assert_same(run(engine, lease(0, PROMPT[:7], params)), wanted)


def _fail_together(engine: TorchEngine, sick: set[int]) -> None:
    """Steps of several chunks raise at times, steps of a sick lease alone always do."""
    runner = only(engine)._runner
    launch, draw = runner.launch, random.Random(3)

    def faulty(chunks: Rows[Chunk], rows: Rows[Row], previous: Launched | None = None) -> Launched:
        is_sick = any(chunk.sequence.lease_key in sick for chunk in chunks)
        if (len(chunks) > 1 and draw.random() < 0.3) or (is_sick and draw.random() < 0.3):
            raise RuntimeError("a fault")
        return launch(chunks, rows, previous)

    runner.launch = faulty  # type: ignore[method-assign]


@pytest.mark.parametrize("settings", [{}, TIGHT], ids=["roomy", "tight"])
def test_a_fault_at_launch_ends_its_lease_only(qwen3: Path, settings: dict[str, Any]) -> None:
    leases = plain_leases()
    wanted = run(one_by_one(qwen3), *leases)
    engine = overlapping(qwen3, **settings)
    _fail_together(engine, {10, 100})
    record = run(engine, *leases)
    assert set(record.failures) <= {10, 100}
    assert record.failures
    for key, tokens in wanted.tokens.items():
        if key // 10 * 10 not in record.failures:
            assert record.tokens[key] == tokens
            assert record.logprobs[key] == wanted.logprobs[key]


def test_no_token_is_computed_past_the_last_that_may_come(qwen3: Path) -> None:
    """Only a stop that nobody can foresee costs a row."""
    engine = overlapping(qwen3)
    num_rows: list[int] = []
    runner = only(engine)._runner
    launch = runner.launch

    def counted(chunks: Rows[Chunk], rows: Rows[Row], previous: Launched | None = None) -> Launched:
        num_rows.append(sum(chunk.num_tokens for chunk in chunks))
        return launch(chunks, rows, previous)

    runner.launch = counted  # type: ignore[method-assign]
    run(engine, lease(0, PROMPT, SamplingParams(max_tokens=5, seed=1, ignore_eos=True)))
    assert num_rows == [60, 1, 1, 1, 1]
    num_rows.clear()
    any_token = tuple(range(3, 320))
    run(engine, lease(0, PROMPT, SamplingParams(max_tokens=5, stop_token_ids=any_token)))
    assert len(num_rows) == 2


def test_the_cache_never_knows_a_token_that_is_pending(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = overlapping(qwen3, block_size=1, num_blocks=400)
    blocks = only(engine)._batcher.blocks
    publish, published = blocks.publish, list[int]()

    def checked(table: list[int], index: int, token_ids: Rows[int], salt: str) -> None:
        published.append(token_ids[index])
        publish(table, index, token_ids, salt)

    monkeypatch.setattr(blocks, "publish", checked)
    record = run(engine, lease(0, PROMPT, SamplingParams(max_tokens=9, seed=1, ignore_eos=True)))
    assert PENDING not in published
    assert published == PROMPT + record.tokens[0][:-1]


def test_an_overlapping_engine_proves_the_same_class(qwen3: Path) -> None:
    ours, wanted = (
        build(qwen3, overlap_scheduling=overlaps).models[0].exactness_class
        for overlaps in (True, False)
    )
    assert ours == wanted != ""
