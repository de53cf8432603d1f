"""Cases that run in Triton's interpreter: test_kernels.py starts pytest on this file for them.

The interpreter has to be chosen before Triton is imported, and for the whole process: by
TRITON_INTERPRET=1.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
import triton
from torch import Tensor

from bench.kernels import (
    LIMITS,
    PREFILLS,
    STEP,
    Case,
    Chunk,
    Shape,
    is_same_alone,
    is_same_replayed,
    max_error,
)
from executor_svc.core.engine import SamplingParams
from executor_svc.torch_engine.attention import reference
from executor_svc.torch_engine.attention.base import AttentionBackend
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.graphs import Computed, DecodeGraphs
from executor_svc.torch_engine.kernels.elementwise import add_rms_norm, rms_norm, rotate, silu_mul
from executor_svc.torch_engine.kernels.rotate_store import rotate_and_store
from executor_svc.torch_engine.layers import RMSNorm, Rotary
from executor_svc.torch_engine.sampler import Row, SamplingBatch, sample
from executor_svc.torch_engine.staging import Staging
from executor_svc.torch_engine.static_sampler import StaticSampler
from tests.engine.checkpoints import make_checkpoint
from tests.engine.driving import build, lease, only, run

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

CPU = torch.device("cpu")
# Enough for adapters, which do not compute; block 256 has room for all of it.
SHORT = (Chunk(0, 1, 0), Chunk(1, 1, 20), Chunk(2, 1, 1), Chunk(3, 4, 24), Chunk(4, 6, 6))
MAX_ERROR = {torch.float32: 3e-6, torch.float16: 2e-3}


@pytest.mark.parametrize(
    "shape",
    # the families' heads, and what needs padding: 80 dims, 7 and 3 heads in a group, odd blocks
    [
        Shape(128, 4, 16, torch.float16),
        Shape(64, 8, 256, torch.float32),
        Shape(96, 1, 64, torch.float16),
        Shape(80, 7, 32, torch.float32),
        Shape(128, 3, 5, torch.float32),
        Shape(256, 2, 16, torch.float16),
    ],
    ids=str,
)
def test_attention_equals_its_definition(shape: Shape) -> None:
    assert max_error(Case(shape, CPU)) < MAX_ERROR[shape.dtype]


def test_more_heads_than_a_tile_has_rows() -> None:
    shape = Shape(16, 40, 16, torch.float32)
    chunks = (Chunk(0, 1, 300), Chunk(1, 3, 20))
    assert max_error(Case(shape, CPU, chunks)) < MAX_ERROR[torch.float32]


@pytest.mark.parametrize("dtype", MAX_ERROR)
def test_company_does_not_change_a_bit(dtype: torch.dtype) -> None:
    chunks = (Chunk(0, 1, 1), Chunk(1, 1, 300), Chunk(2, 1, 0), Chunk(3, 3, 257), Chunk(4, 5, 5))
    assert is_same_alone(Case(Shape(64, 4, 16, dtype), CPU, chunks))


@pytest.mark.parametrize("dtype", MAX_ERROR)
def test_prefill_has_the_bits_of_decode(dtype: torch.dtype) -> None:
    assert is_same_replayed(Case(Shape(64, 4, 16, dtype), CPU, PREFILLS[:2]))


def test_keys_are_stored_where_they_belong_and_nowhere_else() -> None:
    case = Case(Shape(64, 2, 16, torch.float32), CPU)
    backend = case.triton()
    before = backend._cache.keys.clone()
    case.run(backend, [replace(chunk, context=0, num_new=1) for chunk in STEP], torch.float32)
    assert torch.equal(backend._cache.keys.nan_to_num(7), before.nan_to_num(7))
    backend._cache.keys.fill_(0)
    case.run(backend, [Chunk(5, 5, 5)], torch.float32)
    slot = case.tables[5][0] * 16
    stored = backend._cache.keys[0].flatten(0, 1)
    assert torch.equal(stored[slot : slot + 5], case.rows[5][1])
    assert torch.count_nonzero(stored) == torch.count_nonzero(stored[slot : slot + 5])


def _documented_varlen(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    contexts: Tensor | None,
    tables: Tensor | None,
) -> Tensor:
    """Causal attention as the documentation of both FlashAttentions describes its arguments."""
    out = torch.full_like(q, torch.nan)
    for i in range(len(query_starts) - 1):
        rows = slice(int(query_starts[i]), int(query_starts[i + 1]))
        if tables is None:
            span = slice(int(key_starts[i]), int(key_starts[i + 1]))
            own_keys, own_values = keys[span], values[span]
        else:
            count = int(key_starts[i + 1] - key_starts[i])
            assert contexts is None or count == contexts[i]
            own_keys = keys[tables[i].long()].flatten(0, 1)[:count]
            own_values = values[tables[i].long()].flatten(0, 1)[:count]
        out[rows] = reference.attend(q[rows], own_keys, own_values).to(q.dtype)
    return out


def _fake_torch_varlen(signature: inspect.Signature) -> Callable[..., Tensor]:
    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        assert given["window_size"] == (-1, 0)  # causal
        assert given["enable_gqa"]
        assert given["max_q"] >= int(given["cu_seq_q"].diff().max())
        assert given["max_k"] >= int(given["cu_seq_k"].diff().max())
        assert ("block_table" in given) == ("seqused_k" in given)
        return _documented_varlen(
            given["query"],
            given["key"],
            given["value"],
            given["cu_seq_q"],
            given["cu_seq_k"],
            given.get("seqused_k"),
            given.get("block_table"),
        )

    return varlen_attn


def _check(case: Case, backend: AttentionBackend, *, has_dummy: bool) -> None:
    chunks = [chunk for chunk in SHORT if chunk.context or has_dummy]
    wanted = case.run(case.triton(), chunks, torch.float32)
    for _ in range(2):  # buffers that stay are filled anew
        assert torch.allclose(case.run(backend, chunks, torch.float32), wanted, atol=1e-5)
    decode = [chunk for chunk in chunks if chunk.num_new == 1 and chunk.context]
    assert not backend.can_replay
    wanted = case.run(case.triton(), decode, torch.float32)
    assert torch.allclose(case.run(backend, decode, torch.float32), wanted, atol=1e-5)
    assert backend.can_replay


def test_torch_flash_passes_what_varlen_attn_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.varlen import varlen_attn

    from executor_svc.torch_engine.attention import torch_flash

    fake = _fake_torch_varlen(inspect.signature(varlen_attn))
    monkeypatch.setattr(torch_flash, "varlen_attn", fake)
    case = Case(Shape(64, 4, 256, torch.float32), CPU, SHORT)
    backend = torch_flash.TorchFlashAttention(case.cache(torch.float32), limits=LIMITS)
    _check(case, backend, has_dummy=False)


def test_gathered_prefill_passes_what_varlen_attn_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.nn.attention.varlen import varlen_attn

    from executor_svc.torch_engine.attention import gathered

    fake = _fake_torch_varlen(inspect.signature(varlen_attn))
    monkeypatch.setattr(gathered, "varlen_attn", fake)
    case = Case(Shape(64, 4, 16, torch.float32), CPU, SHORT)
    _check(case, case.triton(prefills_with_flash=True), has_dummy=True)


def test_flash_attn_passes_what_its_functions_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the names and meanings of flash-attn 2.8.3's arguments."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool,
        block_table: Tensor,
    ) -> Tensor:
        assert causal
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
        assert max_seqlen_k >= int(cu_seqlens_k.diff().max())
        return _documented_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, None, block_table)

    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        causal: bool,
    ) -> Tensor:
        assert causal
        assert q.shape[:2] == (len(cache_seqlens), 1)
        starts = torch.arange(len(q) + 1)
        key_starts = torch.cat([starts[:1], cache_seqlens.cumsum(0)])
        out = _documented_varlen(
            q[:, 0], k_cache, v_cache, starts, key_starts, cache_seqlens, block_table
        )
        return out[:, None]

    package: Any = ModuleType("flash_attn")
    package.__version__ = "2.8.3"
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    from executor_svc.torch_engine.attention.flash_attn_pkg import FlashAttention

    case = Case(Shape(64, 4, 256, torch.float32), CPU, SHORT)
    _check(case, FlashAttention(case.cache(torch.float32), limits=LIMITS), has_dummy=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_elementwise_kernels_equal_the_layers(dtype: torch.dtype, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    def is_close(a: Tensor, b: Tensor) -> bool:
        return a.dtype == b.dtype and torch.allclose(a, b, atol=tolerance, rtol=tolerance)

    weight, x = numbers(96), numbers(5, 96)
    norm = RMSNorm(weight, 1e-6)
    assert is_close(rms_norm(x, weight, 1e-6), norm(x))
    heads = numbers(5, 6, 96)[:, :4]  # queries as a decoder cuts them out: rows with gaps
    assert is_close(rms_norm(heads, weight, 1e-6), norm(heads))
    y = numbers(5, 96)
    normed, total = add_rms_norm(x, y, weight, 1e-6)
    assert torch.equal(total, x + y)
    assert is_close(normed, norm(x + y))
    gate_up = numbers(5, 2 * 1500)
    gate, up = gate_up.chunk(2, dim=-1)
    assert is_close(silu_mul(gate_up), F.silu(gate) * up)
    cos, sin = torch.rand(2, 5, 1, 48, generator=draw)
    assert is_close(rotate(heads, cos, sin), Rotary.apply(heads, cos, sin))


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_rotating_and_storing_at_once_equals_the_layers(
    head_dim: int, dtype: torch.dtype, *, has_norms: bool
) -> None:
    draw = torch.Generator().manual_seed(head_dim)
    num_q, num_kv = 6, 2
    heads = torch.randn(4, num_q + 2 * num_kv, head_dim, generator=draw).to(dtype)
    angles = torch.rand(2, 4, 1, head_dim // 2, generator=draw).unbind(0)
    q_norm, k_norm = (
        RMSNorm(weight, 1e-6) for weight in torch.randn(2, head_dim, generator=draw).to(dtype)
    )
    norms = (q_norm.weight, k_norm.weight, 1e-6) if has_norms else None
    slots = torch.tensor([7, -1, 3])  # the last row is padding

    def run_rows(first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = torch.full((2, 3, 4, num_kv, head_dim), 9.0).to(dtype).unbind(0)
        cos, sin = (part[first:end] for part in angles)
        target = slots[first:end], keys, values
        q = rotate_and_store(heads[first:end], num_q, (cos, sin), norms, *target)
        return q, keys.flatten(0, 1), values.flatten(0, 1)

    q, keys, values = run_rows(0, 4)
    wanted_q, wanted_k, wanted_v = heads.split([num_q, num_kv, num_kv], dim=1)
    if has_norms:
        wanted_q, wanted_k = q_norm(wanted_q), k_norm(wanted_k)
    wanted_q, wanted_k = (Rotary.apply(x, *angles) for x in (wanted_q, wanted_k))
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    assert torch.allclose(q, wanted_q, atol=tolerance, rtol=tolerance)
    assert torch.allclose(keys[[7, 3]], wanted_k[[0, 2]], atol=tolerance, rtol=tolerance)
    assert torch.equal(values[[7, 3]], wanted_v[[0, 2]])
    others = [slot for slot in range(12) if slot not in (7, 3)]
    assert (keys[others] == 9).all()
    assert (values[others] == 9).all()
    alone = run_rows(2, 3)
    assert torch.equal(alone[0], q[2:3])
    assert torch.equal(alone[1][3], keys[3])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", family="qwen3")


PROMPTS = [[(7 * i) % 300 + 3 for i in range(length)] for length in (1, 5, 19)]
PARAMS = SamplingParams(max_tokens=3, seed=3, ignore_eos=True)


def _engine(model: Path, backend: str, **settings: Any) -> TorchEngine:
    # Without exact mode, since its self-test takes the interpreter half a minute.
    return build(model, attention_backend=backend, exact_mode=False, kv_bytes=1 << 18, **settings)


def test_a_whole_engine_on_triton_equals_the_cpu_one(model: Path) -> None:
    leases = [lease(key, prompt, PARAMS) for key, prompt in enumerate(PROMPTS)]
    ours = run(_engine(model, "triton", max_num_batched_tokens=10, max_num_seqs=4), *leases)
    wanted = run(_engine(model, "cpu"), *leases)
    assert ours.tokens == wanted.tokens
    for key, logprobs in wanted.logprobs.items():
        assert ours.logprobs[key] == pytest.approx(logprobs, abs=1e-5)


class Replays:
    """Graphs, but for CUDA: a replay computes again what was captured, on the same buffers."""

    def __init__(self) -> None:
        self.counts: list[int] = []  # of each graph, in order of their capture

    def __call__(self, compute: Callable[[], Computed]) -> tuple[Computed, Callable[[], None]]:
        number, out = len(self.counts), compute()
        self.counts.append(0)

        def replay() -> None:
            self.counts[number] += 1
            for kept, new in zip(out, compute(), strict=True):
                if kept is not None and new is not None:
                    kept.copy_(new)

        return out, replay


def _with_graphs(engine: TorchEngine, max_num_seqs: int) -> Replays:
    runner, replays = only(engine)._runner, Replays()
    runner._graphs = DecodeGraphs(
        runner._model,
        runner._backend,
        runner._staging,
        max_num_seqs=max_num_seqs,
        device=CPU,
        capture=replays,
    )
    runner._graphs.warm_up()
    return replays


@pytest.mark.parametrize("overlaps", [False, True])
def test_replayed_decode_steps_equal_plain_ones(model: Path, *, overlaps: bool) -> None:
    """Greedy rows and rows with cuts, one of which ends at a stop that nobody foresees."""
    stop = run(_engine(model, "cpu"), lease(1, PROMPTS[1], PARAMS)).tokens[1][1]
    params = [
        SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True),
        replace(PARAMS, stop_token_ids=(stop,)),
        replace(PARAMS, temperature=0.8, top_k=30, top_p=0.9, min_p=0.01),
    ]
    leases = [lease(key, PROMPTS[key], params[key]) for key in range(3)]
    plain = run(_engine(model, "triton"), *leases)
    engine = _engine(model, "triton", max_num_seqs=4, overlap_scheduling=overlaps)
    replays = _with_graphs(engine, 4)
    graphed = run(engine, *leases)
    # Captured were the largest first, each as logits and draws; all steps but the prefill are
    # replayed, of three rows in four, and the last one of two, where the stop was seen in time.
    assert replays.counts == ([2, 2, 0, 0, 0, 0] if overlaps else [1, 1, 1, 1, 0, 0])
    assert graphed.tokens == plain.tokens
    assert len(graphed.tokens[1]) == 2
    for key, logprobs in plain.logprobs.items():
        assert graphed.logprobs[key] == pytest.approx(logprobs, abs=1e-6)


def test_rows_that_no_graph_can_draw_are_drawn_after_it(model: Path) -> None:
    wishes = [
        replace(PARAMS, repetition_penalty=1.5),
        replace(PARAMS, top_logprobs=2),
        replace(PARAMS, min_tokens=2, ignore_eos=False),
    ]
    leases = [lease(key, PROMPTS[key], params) for key, params in enumerate(wishes)]
    plain = run(_engine(model, "cpu"), *leases)
    engine = _engine(model, "triton", max_num_seqs=4, overlap_scheduling=True)
    replays = _with_graphs(engine, 4)
    graphed = run(engine, *leases)
    assert graphed.tokens == plain.tokens
    assert replays.counts[0] == PARAMS.max_tokens - 1
    assert sum(replays.counts[1::2]) == 0


ROWS = 6


def _odds(vocab: int) -> Tensor:
    """Sharp rows and flat ones, and one with many ties."""
    draw = torch.Generator().manual_seed(vocab)
    widths = torch.tensor([6.0, 0.1, 3.0, 1.0, 4.0, 2.0])[:, None]
    logits = torch.randn(ROWS, vocab, generator=draw) * widths
    logits[3] = logits[3].round()
    return logits


def _row(params: SamplingParams, sample: int) -> Row:
    return Row.of(params, sample, ())


@pytest.mark.parametrize("vocab", [5, 320, 2500])
@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_k": 40, "top_p": 0.5},
        {"top_k": 1000, "top_p": 0.99, "min_p": 0.02},
    ],
    ids=str,
)
def test_a_gpu_draws_the_tokens_that_the_definition_draws(vocab: int, cuts: dict[str, Any]) -> None:
    logits = _odds(vocab)
    params = SamplingParams(1, seed=(7 << 40) + 3, temperature=0.9, **cuts)
    rows = [_row(replace(params, seed=params.seed * i), i % 2) for i in range(ROWS - 1)]
    rows.append(_row(replace(params, temperature=0.0), 0))
    indices = [11 * i for i in range(ROWS)]
    wanted = sample(logits, SamplingBatch(rows, indices))
    by_kernels = sample(logits, SamplingBatch(rows, indices, with_kernels=True))
    assert torch.equal(by_kernels.token_ids, wanted.token_ids)
    assert torch.allclose(by_kernels.logprobs, wanted.logprobs, atol=1e-6)
    static = StaticSampler(8, Staging(CPU), CPU)
    static.fill(rows, indices, 8)
    dummies = torch.zeros(8 - ROWS, vocab)
    captured = static.sample(torch.cat([logits, dummies]))
    assert torch.equal(captured.token_ids[:ROWS], by_kernels.token_ids)
    assert torch.equal(captured.logprobs[:ROWS], by_kernels.logprobs)
    # Alone, a row has the bits that it has in company.
    static.fill(rows[2:3], indices[2:3], 1)
    alone = static.sample(logits[2:3])
    assert torch.equal(alone.token_ids, captured.token_ids[2:3])
    assert torch.equal(alone.logprobs, captured.logprobs[2:3])


def test_rows_that_are_no_numbers_upset_nobody() -> None:
    logits = _odds(320)
    params = SamplingParams(1, top_k=5, top_p=0.9, seed=3)
    rows, indices = [_row(params, i) for i in range(ROWS)], [0] * ROWS
    wanted = sample(logits, SamplingBatch(rows, indices))
    logits[1] = torch.nan
    got = sample(logits, SamplingBatch(rows, indices, with_kernels=True))
    assert got.logprobs[1].isnan()
    others = [0, *range(2, ROWS)]
    assert torch.equal(got.token_ids[others], wanted.token_ids[others])
    assert 0 <= int(got.token_ids[1]) < 320
