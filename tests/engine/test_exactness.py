"""The same lease gives the same bits whatever happens around it: tokens and logprobs compared."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from bench import exactness
from executor_svc.core.batcher import Chunk
from executor_svc.core.engine import LeaseRequest, SamplingParams
from executor_svc.torch_engine.attention.cpu import CpuAttention
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.models.decoder import Decoder
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
        # The self-test would take a step for each token of its prompt, too.
        settings = {"max_num_seqs": 1, "max_num_batched_tokens": budget, "exact_mode": False}
        engine = build(qwen3, dtype=dtype, **settings)
        assert _same(whole, run(engine, lease(0, PROMPT, PARAMS)))


def test_what_the_cache_has_does_not_matter(qwen3: Path, dtype: str) -> None:
    cold = run(build(qwen3, dtype=dtype, enable_prefix_caching=False), lease(0, PROMPT, PARAMS))
    assert cold.num_cached == {0: 0}
    engine = build(qwen3, dtype=dtype)
    for length, num_cached in ((50, 0), (len(PROMPT), 48), (len(PROMPT), 128)):
        record = run(engine, lease(0, PROMPT[:length], PARAMS))
        assert record.num_cached == {0: num_cached}
        if length == len(PROMPT):
            assert _same(cold, record)


def test_a_prompt_that_was_another_ones_output_is_found(qwen3: Path, dtype: str) -> None:
    """A chat's next turn begins with the last one's prompt and answer."""
    engine = build(qwen3, dtype=dtype)
    turn = run(engine, lease(0, PROMPT[:40], PARAMS))
    chat = [*PROMPT[:40], *turn.tokens[0], 7, 8, 9]
    follow_up = run(engine, lease(0, chat, PARAMS))
    assert follow_up.num_cached == {0: 48}  # 40 + 24 less the last token, in whole blocks
    assert _same(follow_up, run(build(qwen3, dtype=dtype), lease(0, chat, PARAMS)))


def test_tenants_do_not_feel_each_others_cache(qwen3: Path) -> None:
    engine = build(qwen3)
    run(engine, lease(0, PROMPT, PARAMS, cache_salt="alice"))
    assert run(engine, lease(0, PROMPT, PARAMS, cache_salt="bob")).num_cached == {0: 0}
    assert run(engine, lease(0, PROMPT, PARAMS, cache_salt="alice")).num_cached == {0: 128}


def test_samples_compute_their_prompt_once(qwen3: Path, dtype: str) -> None:
    engine = build(qwen3, dtype=dtype)
    rows = _count_rows(engine)
    together = run(engine, lease(0, PROMPT, replace(PARAMS, max_tokens=2), num_samples=4))
    # The prompt; for the others what does not fill a block (140 = 8 * 16 + 12); second tokens.
    assert sum(rows) == 140 + 3 * 12 + 4
    assert together.num_cached == {0: 0}
    cold = build(qwen3, dtype=dtype, enable_prefix_caching=False)
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


def test_preemption_does_not_matter(qwen3: Path, dtype: str) -> None:
    leases = [lease(i, PROMPT[i : 30 + 6 * i], PARAMS) for i in range(6)]
    roomy = run(build(qwen3, dtype=dtype), *leases)
    # 34 blocks of 8 tokens hold the six prompts, but not all that comes after them.
    tight_engine = build(qwen3, dtype=dtype, num_blocks=34, block_size=8)
    tight = run(tight_engine, *leases)
    assert tight_engine.num_preemptions >= 2
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


# --- the class, by which engines know each other


def _class(folder: Path, **settings: Any) -> str:
    return build(folder, **settings).models[0].exactness_class


def test_equal_engines_are_of_one_class_whatever_their_batches_are(qwen3: Path) -> None:
    usual = _class(qwen3)
    assert len(bytes.fromhex(usual)) == 32
    for settings in (
        {"max_num_seqs": 2, "max_num_batched_tokens": 9},
        {"block_size": 5},
        {"enable_prefix_caching": False},
        {"num_blocks": 9},  # preempts in the self-test
        {"num_threads": 2},
    ):
        assert _class(qwen3, **settings) == usual, settings


def test_each_ingredient_makes_another_class(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = [
        _class(qwen3),
        _class(qwen3, dtype="bfloat16"),
        _class(qwen3, attention_backend="reference"),
        _class(qwen3, quantization="int8"),
        _class(make_checkpoint(tmp_path, seed=1)),
    ]
    monkeypatch.setattr(torch, "__version__", "2.13.1")
    classes.append(_class(qwen3))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    classes.append(_class(qwen3))
    promised = [name for name in classes if name]
    assert len(set(promised)) == len(promised) >= 5
    assert all(classes[i] for i in (0, 1, 4, 5, 6))


def test_tiles_of_another_size_are_another_class(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = _class(qwen3)
    init = CpuAttention.__init__

    def with_other_tiles(self: CpuAttention, *args: Any, **fields: Any) -> None:
        init(self, *args, **(fields | {"tile_rows": 64}))

    monkeypatch.setattr(CpuAttention, "__init__", with_other_tiles)
    other = _class(qwen3)
    assert other not in ("", usual)


def test_a_model_that_feels_its_company_promises_nothing(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = Decoder.logits

    def by_number_of_rows(self: Decoder, hidden: Tensor) -> Tensor:
        return logits(self, hidden) * (1 + 1e-6 * hidden.shape[0])

    monkeypatch.setattr(Decoder, "logits", by_number_of_rows)
    assert _class(qwen3) == ""


def test_a_decode_that_differs_from_prefill_promises_nothing(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_attention = CpuAttention.run

    def decode_differs(
        self: CpuAttention, layer_index: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        out = run_attention(self, layer_index, q, k, v)
        return out * (1 + 1e-6) if len(self._slots) == 1 else out

    monkeypatch.setattr(CpuAttention, "run", decode_differs)
    assert _class(qwen3) == ""


def test_a_decode_that_differs_past_a_block_of_keys_promises_nothing(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_attention = CpuAttention.run

    def decode_differs(
        self: CpuAttention, layer_index: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        out = run_attention(self, layer_index, q, k, v)
        is_far = any(tile.keys.stop > 512 for tile in self._groups[None][0].tiles)
        return out * (1 + 1e-6) if len(self._slots) == 1 and is_far else out

    monkeypatch.setattr(CpuAttention, "run", decode_differs)
    assert _class(qwen3) == ""
    assert _class(qwen3, max_model_len=400) != ""


def test_without_exact_mode_nothing_is_promised(qwen3: Path) -> None:
    assert _class(qwen3, exact_mode=False) == ""


def test_models_that_cannot_be_probed_promise_nothing(qwen3: Path, tmp_path: Path) -> None:
    assert _class(qwen3, num_blocks=1, block_size=1) == ""
    assert _class(qwen3, num_blocks=1, block_size=2) != ""
    folder = make_checkpoint(tmp_path)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    assert _class(folder) == ""


def test_a_cold_model_is_of_no_class_until_it_is_loaded(qwen3: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, seed=1)
    models = (("a", str(qwen3)), ("b", str(other)))
    engine = TorchEngine(EngineConfig(models=models, max_models=1, kv_bytes=1 << 22, num_threads=1))
    first, cold = (info.exactness_class for info in engine.models)
    assert (bool(first), cold) == (True, "")
    engine.load("b", ("a",))
    assert engine.models[0].exactness_class == first
    assert engine.models[1].exactness_class not in ("", first)


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
