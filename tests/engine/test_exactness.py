"""The same lease gives the same bits whatever happens around it: tokens and logprobs compared."""

from dataclasses import replace
from pathlib import Path

import pytest

from executor_svc.core.engine import LeaseRequest, SamplingParams
from tests.engine.driving import Record, build, lease, only, run

PARAMS = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.95, seed=1234, ignore_eos=True)
PROMPT = [(7 * i) % 300 + 3 for i in range(140)]


def _company(first_key: int, count: int = 9) -> list[LeaseRequest]:
    """Leases of other lengths and settings; greedy ones and ones with other cuts among them."""
    return [
        lease(
            first_key + i,
            PROMPT[i : 3 + 11 * i],
            SamplingParams(
                max_tokens=5 + 4 * i, temperature=0.3 * i, top_k=i, seed=i, ignore_eos=True
            ),
        )
        for i in range(count)
    ]


def _same(a: Record, b: Record, key: int = 0) -> bool:
    return a.tokens[key] == b.tokens[key] and a.logprobs[key] == b.logprobs[key]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def test_batch_company_does_not_matter(qwen3: Path, dtype: str) -> None:
    alone = run(build(qwen3, dtype=dtype), lease(0, PROMPT, PARAMS))
    mine, company = lease(0, PROMPT, PARAMS), _company(100)
    last = run(build(qwen3, dtype=dtype), *company, mine)
    first = run(build(qwen3, dtype=dtype), mine, *company)
    assert len(alone.tokens[0]) == 24
    assert _same(alone, last)
    assert _same(alone, first)


def test_chunk_size_does_not_matter(qwen3: Path, dtype: str) -> None:
    whole = run(build(qwen3, dtype=dtype), lease(0, PROMPT, PARAMS))
    for budget in (1, 3, 7, 16, 33, 100):
        engine = build(qwen3, dtype=dtype, max_num_seqs=1, max_num_batched_tokens=budget)
        assert _same(whole, run(engine, lease(0, PROMPT, PARAMS)))


def test_block_size_does_not_matter(qwen3: Path) -> None:
    usual = run(build(qwen3), lease(0, PROMPT, PARAMS))
    for block_size in (1, 5, 64):
        assert _same(usual, run(build(qwen3, block_size=block_size), lease(0, PROMPT, PARAMS)))


def test_number_of_threads_does_not_matter(qwen3: Path, dtype: str) -> None:
    params = replace(PARAMS, max_tokens=4)
    one = run(build(qwen3, dtype=dtype), lease(0, PROMPT, params))
    two = run(build(qwen3, dtype=dtype, num_threads=2), lease(0, PROMPT, params))
    assert _same(one, two)


def test_preemption_does_not_matter(qwen3: Path, dtype: str) -> None:
    leases = [lease(i, PROMPT[: 30 + 5 * i], PARAMS) for i in range(6)]
    roomy = run(build(qwen3, dtype=dtype), *leases)
    # 34 blocks of 8 tokens hold the six prompts, but not all that comes after them.
    tight_engine = build(qwen3, dtype=dtype, num_blocks=34, block_size=8)
    tight = run(tight_engine, *leases)
    assert only(tight_engine)._batcher.num_preemptions >= 2
    assert all(_same(roomy, tight, key) for key in range(6))
    assert all(tight.indices[key] == list(range(24)) for key in range(6))


def test_resume_at_every_index(qwen3: Path, dtype: str) -> None:
    whole = run(build(qwen3, dtype=dtype), lease(0, PROMPT, PARAMS))
    tokens = whole.tokens[0]
    company = _company(1000, count=4)
    rest = run(
        build(qwen3, dtype=dtype, max_num_seqs=8, max_num_batched_tokens=50),
        *company,
        *(
            lease(held, PROMPT, PARAMS, generated=(tokens[:held],))
            for held in range(1, len(tokens))
        ),
    )
    for held in range(1, len(tokens)):
        assert rest.tokens[held] == tokens[held:]
        assert rest.logprobs[held] == whole.logprobs[0][held:]
        assert rest.indices[held] == list(range(held, len(tokens)))
        assert rest.ends[held].num_tokens == len(tokens)


def test_samples_differ_and_repeat(qwen3: Path) -> None:
    first = run(build(qwen3), lease(0, PROMPT[:20], PARAMS, num_samples=5))
    again = run(build(qwen3), lease(50, PROMPT[:20], PARAMS, num_samples=5))
    assert len({tuple(tokens) for tokens in first.tokens.values()}) == 5
    assert list(first.tokens.values()) == list(again.tokens.values())
    alone = run(build(qwen3), lease(0, PROMPT[:20], PARAMS))
    assert _same(alone, first)


def test_ended_samples_are_skipped(qwen3: Path) -> None:
    whole = run(build(qwen3), lease(0, PROMPT[:20], PARAMS, num_samples=3))
    held = (whole.tokens[0][:4], whole.tokens[1], ())
    part = run(
        build(qwen3),
        lease(0, PROMPT[:20], PARAMS, num_samples=3, generated=held, ended=frozenset({1})),
    )
    assert part.tokens == {0: whole.tokens[0][4:], 2: whole.tokens[2]}
    assert part.ends.keys() == {0, 2}


def test_another_seed_is_another_text(qwen3: Path) -> None:
    other = SamplingParams(max_tokens=24, seed=99, ignore_eos=True)
    record = run(build(qwen3), lease(0, PROMPT, PARAMS), lease(1, PROMPT, other))
    assert record.tokens[0] != record.tokens[1]
