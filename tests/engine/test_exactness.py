"""The same lease gives the same bits whatever happens around it: tokens and logprobs compared."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import exactness
from executor_svc.core.batcher import Chunk
from executor_svc.core.engine import LeaseRequest, SamplingParams
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.runner import Launched
from executor_svc.torch_engine.sampler import Row
from tests.engine.checkpoints import make_checkpoint
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


@pytest.fixture(params=["qwen3", "qwen3-window"])
def model(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def test_batch_company_does_not_matter(model: Path, dtype: str) -> None:
    alone = run(build(model, dtype=dtype), lease(0, PROMPT, PARAMS))
    mine, company = lease(0, PROMPT, PARAMS), _company(100)
    last = run(build(model, dtype=dtype), *company, mine)
    first = run(build(model, dtype=dtype), mine, *company)
    assert len(alone.tokens[0]) == 24
    assert _same(alone, last)
    assert _same(alone, first)


def test_chunk_size_does_not_matter(model: Path, dtype: str) -> None:
    whole = run(build(model, dtype=dtype), lease(0, PROMPT, PARAMS))
    for budget in (1, 3, 7, 16, 33, 100):
        # The self-test would take a step for each token of its prompt, too.
        settings = {"max_num_seqs": 1, "max_num_batched_tokens": budget, "exact_mode": False}
        engine = build(model, dtype=dtype, **settings)
        assert _same(whole, run(engine, lease(0, PROMPT, PARAMS)))


def test_what_the_cache_has_does_not_matter(model: Path, dtype: str) -> None:
    cold = run(build(model, dtype=dtype, enable_prefix_caching=False), lease(0, PROMPT, PARAMS))
    assert cold.num_cached == {0: 0}
    engine = build(model, dtype=dtype)
    for length, num_cached in ((50, 0), (len(PROMPT), 48), (len(PROMPT), 128)):
        record = run(engine, lease(0, PROMPT[:length], PARAMS))
        assert record.num_cached == {0: num_cached}
        if length == len(PROMPT):
            assert _same(cold, record)


def test_a_prompt_that_was_another_ones_output_is_found(model: Path, dtype: str) -> None:
    """A chat's next turn begins with the last one's prompt and answer."""
    engine = build(model, dtype=dtype)
    turn = run(engine, lease(0, PROMPT[:40], PARAMS))
    chat = [*PROMPT[:40], *turn.tokens[0], 7, 8, 9]
    follow_up = run(engine, lease(0, chat, PARAMS))
    assert follow_up.num_cached == {0: 48}  # 40 + 24 less the last token, in whole blocks
    assert _same(follow_up, run(build(model, dtype=dtype), lease(0, chat, PARAMS)))


def test_tenants_do_not_feel_each_others_cache(qwen3: Path) -> None:
    engine = build(qwen3)
    run(engine, lease(0, PROMPT, PARAMS, cache_salt="alice"))
    assert run(engine, lease(0, PROMPT, PARAMS, cache_salt="bob")).num_cached == {0: 0}
    assert run(engine, lease(0, PROMPT, PARAMS, cache_salt="alice")).num_cached == {0: 128}


def test_samples_compute_their_prompt_once(model: Path, dtype: str) -> None:
    engine = build(model, dtype=dtype)
    rows = _count_rows(engine)
    together = run(engine, lease(0, PROMPT, replace(PARAMS, max_tokens=2), num_samples=4))
    # The prompt; for the others what does not fill a block (140 = 8 * 16 + 12); second tokens.
    assert sum(rows) == 140 + 3 * 12 + 4
    assert together.num_cached == {0: 0}
    cold = build(model, dtype=dtype, enable_prefix_caching=False)
    apart = run(cold, lease(0, PROMPT, replace(PARAMS, max_tokens=2), num_samples=4))
    assert all(_same(together, apart, key) for key in range(4))


def _count_rows(engine: TorchEngine) -> list[int]:
    """Tokens computed in each step from here on."""
    num_rows: list[int] = []
    runner = only(engine)._runner
    launch = runner.launch

    def counted(
        chunks: Sequence[Chunk], rows: Sequence[Row], previous: Launched | None = None
    ) -> Launched:
        num_rows.append(sum(chunk.num_tokens for chunk in chunks))
        return launch(chunks, rows, previous)

    runner.launch = counted  # type: ignore[method-assign]
    return num_rows


def test_block_size_does_not_matter(qwen3: Path) -> None:
    usual = run(build(qwen3), lease(0, PROMPT, PARAMS))
    for block_size in (1, 5, 64):
        assert _same(usual, run(build(qwen3, block_size=block_size), lease(0, PROMPT, PARAMS)))


def test_number_of_threads_does_not_matter(qwen3: Path, dtype: str) -> None:
    params = replace(PARAMS, max_tokens=4)
    one = run(build(qwen3, dtype=dtype), lease(0, PROMPT, params))
    two = run(build(qwen3, dtype=dtype, num_threads=2), lease(0, PROMPT, params))
    assert _same(one, two)


def test_preemption_does_not_matter(model: Path, dtype: str) -> None:
    leases = [lease(i, PROMPT[i : 30 + 6 * i], PARAMS) for i in range(6)]
    roomy = run(build(model, dtype=dtype), *leases)
    # 34 blocks of 8 tokens hold the six prompts, but not all that comes after them.
    tight_engine = build(model, dtype=dtype, num_blocks=34, block_size=8)
    tight = run(tight_engine, *leases)
    assert tight_engine.num_preemptions >= 2
    assert all(_same(roomy, tight, key) for key in range(6))
    assert all(tight.indices[key] == list(range(24)) for key in range(6))


def test_resume_at_every_index(model: Path, dtype: str) -> None:
    whole = run(build(model, dtype=dtype), lease(0, PROMPT, PARAMS))
    tokens = whole.tokens[0]
    company = _company(1000, count=4)
    rest = run(
        build(model, dtype=dtype, max_num_seqs=8, max_num_batched_tokens=50),
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


def test_blocks_of_keys_before_a_window_do_not_matter(tmp_path: Path, dtype: str) -> None:
    """Chunks whose first rows see the block of 512 keys that the last ones do not, and others."""
    window: dict[str, Any] = {"use_sliding_window": True, "max_window_layers": 1}
    folder = make_checkpoint(tmp_path, sliding_window=90, **window)
    prompt, params = [(11 * i) % 300 + 3 for i in range(597)], replace(PARAMS, max_tokens=8)
    whole = run(build(folder, dtype=dtype, max_num_batched_tokens=1024), lease(0, prompt, params))
    engine = build(folder, dtype=dtype, max_num_batched_tokens=77)
    for _ in range(2):  # the second time with what the cache has
        assert _same(whole, run(engine, lease(0, prompt, params)))
    held = [
        lease(count, prompt, params, generated=(whole.tokens[0][:count],)) for count in (1, 4, 7)
    ]
    rest = run(build(folder, dtype=dtype), *_company(100), *held)
    for count in (1, 4, 7):
        assert rest.tokens[count] == whole.tokens[0][count:]
        assert rest.logprobs[count] == whole.logprobs[0][count:]


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


# --- the benchmark, in small


@pytest.mark.parametrize("dtype_name", exactness.DTYPES)
def test_every_sequence_goes_on_unchanged_elsewhere(dtype_name: str) -> None:
    result = exactness.measure(dtype_name, num_sequences=40, seed=2)
    assert result["sequences"] == 40
    assert min(result["sequences_of"].values()) > 0
    assert result["tokens_compared"] > 200
    assert result["preemptions_of"]["little memory"] > 0
    assert result["differences"] == 0


def test_the_benchmark_sees_a_difference() -> None:
    request = lease(10, PROMPT, PARAMS, num_samples=2, generated=((1,), (1, 2)))
    whole = {10: exactness.Stream([1, 2], [0.1, 0.2]), 11: exactness.Stream([1, 2, 3], [0.1] * 3)}
    rest = {10: exactness.Stream([2], [0.2]), 11: exactness.Stream([3], [0.1])}
    assert exactness.differences(request, whole, rest) == 0
    rest[11].logprobs = [0.1000000001]
    assert exactness.differences(request, whole, rest) == 1
    del rest[10]
    assert exactness.differences(request, whole, rest) == 2
