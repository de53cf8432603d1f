"""Attention by our own Triton kernels: pages of any size, exact by construction.

Decode rows go through split-KV decode and merge, longer chunks through the prefill kernel, or, if
told so, through torch's FlashAttention over gathered keys: faster, but with other bits than decode
has, so exact engines do without.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from executor_svc.torch_engine.attention.base import StepLayout, StepLimits
from executor_svc.torch_engine.attention.gathered import GatheredPrefill
from executor_svc.torch_engine.attention.paged import PagedBackend
from executor_svc.torch_engine.attention.triton_plan import (
    TritonPlan,
    make_plan,
    max_meta_len,
    max_num_items,
)
from executor_svc.torch_engine.kernels.paged_attention import (
    CHUNK,
    DECODE_ROWS,
    NUM_WARPS,
    PREFILL_ROWS,
    decode_kernel,
    merge_kernel,
    prefill_kernel,
)
from executor_svc.torch_engine.kv_cache import PagedKVCache
from executor_svc.torch_engine.staging import Staging
from executor_svc.torch_engine.windows import Windows

_WORKSPACE_BYTES = 64 << 20  # for partials: 16k chunks of keys of 8 heads of 128
# Of decode, on each multiprocessor: so many fit at once. With heads of 128 a thread has 168 of a
# Hopper GPU's registers, and programs of a second round would find the work already dealt out.
_PROGRAMS_PER_PROCESSOR = 3
_INTERPRETED_PROGRAMS = 3  # one after the other, so a few show all that matters
_NO_PLAN = TritonPlan(np.empty(0, np.int32), (), 0, False, False)


@dataclass(slots=True)
class _Kind:
    """The layers that have the same window, and the step as they see it."""

    window: int | None
    meta: Tensor  # int32, what captured graphs read
    gathered: GatheredPrefill | None
    plan: TritonPlan = _NO_PLAN


class TritonAttention(PagedBackend):
    """See the module's text; ``max_items`` is the size of the workspace, for tests."""

    name = "triton"
    supports_graphs = True

    def __init__(
        self,
        cache: PagedKVCache,
        *,
        num_heads: int,
        windows: Windows,
        limits: StepLimits,
        prefills_with_flash: bool = False,
        max_items: int | None = None,
    ) -> None:
        super().__init__(cache, windows)
        _, _, _, self._num_kv_heads, self._head_dim = cache.keys.shape
        self._num_heads = num_heads
        self._device = cache.keys.device
        self._shape = kernel_shape(
            num_heads // self._num_kv_heads, self._head_dim, cache.block_size, cache.keys.dtype
        )
        self._decode_rows = decode_rows(self._shape["GROUP"])
        self._prefill_rows = max(PREFILL_ROWS, self._decode_rows)
        self._queries_per_tile = self._prefill_rows // self._shape["GROUP"]
        max_items = max_items or _workspace_items(limits, num_heads, self._head_dim)
        self._staging = Staging(self._device)
        meta_len = max_meta_len(
            limits, block_size=cache.block_size, queries_per_tile=self._queries_per_tile
        )
        self._kinds = {
            window: _Kind(
                window,
                torch.zeros(meta_len, dtype=torch.int32, device=self._device),
                GatheredPrefill(cache, window) if prefills_with_flash else None,
            )
            for window in windows
        }
        self._prefills_with_flash = prefills_with_flash
        self._slots = torch.full((limits.max_num_tokens,), -1, device=self._device)
        self._greatest = torch.empty(max_items, num_heads, device=self._device)
        self._total = torch.empty_like(self._greatest)
        self._mixed = torch.empty(max_items, num_heads, self._head_dim, device=self._device)
        self._num_tokens = 0
        self._num_programs = _num_programs(self._device)

    @property
    def numerics(self) -> str:
        prefill = "flash" if self._prefills_with_flash else f"rows={self._prefill_rows}"
        return (
            f"triton {triton.__version__} chunk={CHUNK} tile={self._shape['TILE']} "
            f"warps={NUM_WARPS} prefill={prefill}"
        )

    @property
    def can_replay(self) -> bool:
        plans = [kind.plan for kind in self._kinds.values()]
        return all(plan.is_pure_decode and len(plan.slices) == 1 for plan in plans)

    @property
    def slots(self) -> Tensor:
        return self._slots[: self._num_tokens]

    def plan(self, layout: StepLayout) -> None:
        with self._staging.step():
            for kind in self._kinds.values():
                kind.plan = make_plan(
                    layout,
                    queries_per_tile=self._queries_per_tile,
                    max_items=len(self._greatest),
                    window=kind.window,
                )
                self._staging.copy(kind.plan.meta, out=kind.meta)
                if kind.gathered is not None:
                    kind.gathered.plan(layout)
        self._num_tokens = len(layout.kv_slot_mapping)
        self._slots[: self._num_tokens] = layout.kv_slot_mapping

    def attend(self, layer_index: int, q: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer_index], self._cache.values[layer_index]
        q = _with_heads_side_by_side(q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out[self._num_tokens :] = 0
        kind = self._kinds[self._windows[layer_index]]
        if kind.plan.has_decode:
            self._decode(kind, out, q, keys, values)
        if kind.gathered is not None:
            kind.gathered.run(out, q, keys, values)
        elif kind.plan.num_tiles:
            self._prefill(kind, out, q, keys, values)
        return out.flatten(1)

    def _decode(self, kind: _Kind, out: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> None:
        partials = (self._greatest, self._total, self._mixed)
        for index, sequences in enumerate(kind.plan.slices):
            decode_kernel[(self._num_programs,)](
                q,
                keys,
                values,
                kind.meta,
                *partials,
                index,
                self._scale,
                q.stride(0),
                keys.stride(1),
                self._num_kv_heads,
                **self._shape,
                WINDOW=kind.window or 0,
                ROWS=self._decode_rows,
                num_warps=NUM_WARPS,
                num_stages=2,
            )
            merge_kernel[(len(sequences), self._num_kv_heads)](
                out,
                kind.meta,
                *partials,
                index,
                sequences.start,
                self._num_heads,
                GROUP=self._shape["GROUP"],
                HEAD_DIM=self._shape["HEAD_DIM"],
                DIM=self._shape["DIM"],
                ROWS=self._decode_rows,
                num_warps=NUM_WARPS,
            )

    def _prefill(self, kind: _Kind, out: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> None:
        prefill_kernel[(kind.plan.num_tiles, self._num_kv_heads)](
            out,
            q,
            keys,
            values,
            kind.meta,
            self._scale,
            q.stride(0),
            keys.stride(1),
            self._num_kv_heads,
            **self._shape,
            WINDOW=kind.window or 0,
            ROWS=self._prefill_rows,
            num_warps=NUM_WARPS,
            num_stages=2,
        )

    @property
    def _scale(self) -> float:
        """Of the scores, for powers of 2."""
        return self._head_dim**-0.5 * math.log2(math.e)


def kernel_shape(
    group_size: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, int]:
    """The constants that both attention kernels are compiled for."""
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    return {
        "GROUP": group_size,
        "HEAD_DIM": head_dim,
        "DIM": padded_dim,
        "BLOCK": block_size,
        "CHUNK": CHUNK,
        "TILE": 64 if padded_dim * dtype.itemsize <= 256 else 32,  # 16 KiB of keys at 128 dims
    }


def decode_rows(group_size: int) -> int:
    """Rows of decode's matrix of queries: those of a kv head, padded."""
    return max(DECODE_ROWS, triton.next_power_of_2(group_size))


def _workspace_items(limits: StepLimits, num_heads: int, head_dim: int) -> int:
    """Partials to make room for: those of all sequences, or fewer if that is much."""
    one_sequence = max_num_items(limits.max_context_tokens)
    fitting = _WORKSPACE_BYTES // (num_heads * (head_dim + 2) * 4)
    return max(one_sequence, min(fitting, limits.max_num_seqs * one_sequence))


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_PROCESSOR * processors


def _with_heads_side_by_side(q: Tensor) -> Tensor:
    return q if q.stride(1) == q.shape[2] and q.stride(2) == 1 else q.contiguous()
