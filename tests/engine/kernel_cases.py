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
from executor_svc.torch_engine.graphs import DecodeGraphs
from executor_svc.torch_engine.kernels.elementwise import add_rms_norm, rms_norm, rotate, silu_mul
from executor_svc.torch_engine.layers import RMSNorm, Rotary
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
    from executor_svc.torch_engine.attention import torch_flash

    fake = _fake_torch_varlen(inspect.signature(torch_flash.varlen_attn))
    monkeypatch.setattr(torch_flash, "varlen_attn", fake)
    case = Case(Shape(64, 4, 256, torch.float32), CPU, SHORT)
    backend = torch_flash.TorchFlashAttention(case.cache(torch.float32), limits=LIMITS)
    _check(case, backend, has_dummy=False)


def test_gathered_prefill_passes_what_varlen_attn_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from executor_svc.torch_engine.attention import gathered

    fake = _fake_torch_varlen(inspect.signature(gathered.varlen_attn))
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


def test_replayed_decode_steps_equal_plain_ones(model: Path) -> None:
    """Graphs, but for CUDA: a replay computes again what was captured, on the same buffers."""
    num_replays = 0

    def capture(compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        out = compute().clone()

        def replay() -> None:
            nonlocal num_replays
            num_replays += 1
            out.copy_(compute())

        return out, replay

    leases = [lease(key, prompt, PARAMS) for key, prompt in enumerate(PROMPTS)]
    plain = run(_engine(model, "triton"), *leases)
    engine = _engine(model, "triton", max_num_seqs=4)
    runner = only(engine)._runner
    runner._graphs = DecodeGraphs(
        runner._model,
        runner._backend,
        runner._staging,
        max_num_seqs=4,
        device=CPU,
        capture=capture,
    )
    runner._graphs.warm_up()
    graphed = run(engine, *leases)
    assert num_replays == PARAMS.max_tokens - 1  # all steps but the prefill, three rows in four
    assert graphed.tokens == plain.tokens
    assert graphed.logprobs == plain.logprobs
