"""The two FlashAttention packages get what they document: stand-ins compute what it means."""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels import LIMITS, Case, Chunk, Shape
from executor_svc.torch_engine.attention import reference
from executor_svc.torch_engine.attention.base import AttentionBackend
from tests.engine.kernel_cases.interpreter import CPU

# Block 256 has room for all of it.
SHORT = (Chunk(0, 1, 0), Chunk(1, 1, 20), Chunk(2, 1, 1), Chunk(3, 4, 24), Chunk(4, 6, 6))
WINDOWS = (None, 1, 5)


def _documented_varlen(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    contexts: Tensor | None,
    tables: Tensor | None,
    window_size: tuple[int, int],
) -> Tensor:
    """Causal attention as the documentation of both FlashAttentions describes its arguments."""
    left, right = window_size
    assert right == 0  # causal
    window = None if left == -1 else left + 1
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
        out[rows] = reference.attend(q[rows], own_keys, own_values, window).to(q.dtype)
    return out


def _fake_torch_varlen(signature: inspect.Signature) -> Callable[..., Tensor]:
    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
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
            given["window_size"],
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


@pytest.mark.parametrize("window", WINDOWS)
def test_torch_flash_passes_what_varlen_attn_documents(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    from torch.nn.attention.varlen import varlen_attn

    from executor_svc.torch_engine.attention import torch_flash

    fake = _fake_torch_varlen(inspect.signature(varlen_attn))
    monkeypatch.setattr(torch_flash, "varlen_attn", fake)
    case = Case(Shape(64, 4, 256, torch.float32, window), CPU, SHORT)
    backend = torch_flash.TorchFlashAttention(
        case.cache(torch.float32), windows=(window,), limits=LIMITS
    )
    _check(case, backend, has_dummy=False)


@pytest.mark.parametrize("window", WINDOWS)
def test_gathered_prefill_passes_what_varlen_attn_documents(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    from torch.nn.attention.varlen import varlen_attn

    from executor_svc.torch_engine.attention import gathered

    fake = _fake_torch_varlen(inspect.signature(varlen_attn))
    monkeypatch.setattr(gathered, "varlen_attn", fake)
    case = Case(Shape(64, 4, 16, torch.float32, window), CPU, SHORT)
    _check(case, case.triton(prefills_with_flash=True), has_dummy=True)


@pytest.mark.parametrize("window", WINDOWS)
def test_flash_attn_passes_what_its_functions_document(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
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
        window_size: tuple[int, int],
        block_table: Tensor,
    ) -> Tensor:
        assert causal
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
        assert max_seqlen_k >= int(cu_seqlens_k.diff().max())
        return _documented_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, None, block_table, window_size
        )

    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        causal: bool,
        window_size: tuple[int, int],
    ) -> Tensor:
        assert causal
        assert q.shape[:2] == (len(cache_seqlens), 1)
        starts = torch.arange(len(q) + 1)
        key_starts = torch.cat([starts[:1], cache_seqlens.cumsum(0)])
        out = _documented_varlen(
            q[:, 0], k_cache, v_cache, starts, key_starts, cache_seqlens, block_table, window_size
        )
        return out[:, None]

    package: Any = ModuleType("flash_attn")
    package.__version__ = "2.8.3"
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    from executor_svc.torch_engine.attention.flash_attn_pkg import FlashAttention

    case = Case(Shape(64, 4, 256, torch.float32, window), CPU, SHORT)
    backend = FlashAttention(case.cache(torch.float32), windows=(window,), limits=LIMITS)
    _check(case, backend, has_dummy=False)
