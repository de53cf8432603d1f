"""Attention by the ``flash-attn`` package (version 2): pages of multiples of 256.

Steps with prefill go through ``flash_attn_varlen_func``, pure decode steps through
``flash_attn_with_kvcache``, which splits long contexts over the GPU. Both choose their tiles and
splits by what is in the step, so it is not for exact engines.
"""

import flash_attn
import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from executor_svc.torch_engine.attention.base import StepLayout, StepLimits
from executor_svc.torch_engine.attention.flash_plan import FlashPlan, window_size
from executor_svc.torch_engine.attention.paged import PagedBackend
from executor_svc.torch_engine.kv_cache import PagedKVCache
from executor_svc.torch_engine.windows import Windows


class FlashAttention(PagedBackend):
    """See the module's text."""

    name = "flash"
    supports_graphs = True

    numerics = f"flash_attn {flash_attn.__version__}"

    def __init__(self, cache: PagedKVCache, *, windows: Windows, limits: StepLimits) -> None:
        super().__init__(cache, windows)
        self._plan = FlashPlan(limits, block_size=cache.block_size, device=cache.keys.device)

    @property
    def can_replay(self) -> bool:
        return self._plan.is_pure_decode

    @property
    def slots(self) -> Tensor:
        return self._plan.slots

    def plan(self, layout: StepLayout) -> None:
        self._plan.fill(layout)

    def attend(self, layer_index: int, q: Tensor) -> Tensor:
        plan = self._plan
        keys, values = self._cache.keys[layer_index], self._cache.values[layer_index]
        run = self._decode if plan.is_pure_decode else self._prefill
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        seen = window_size(self._windows[layer_index])
        out[: plan.num_tokens] = run(q[: plan.num_tokens], keys, values, seen)
        return out.flatten(1)

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, seen: tuple[int, int]) -> Tensor:
        plan = self._plan
        return flash_attn_varlen_func(
            q,
            keys,
            values,
            cu_seqlens_q=plan.query_starts,
            cu_seqlens_k=plan.key_starts,
            max_seqlen_q=plan.max_query_len,
            max_seqlen_k=plan.max_context,
            causal=True,
            window_size=seen,
            block_table=plan.tables,
        )

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, seen: tuple[int, int]) -> Tensor:
        plan = self._plan
        return flash_attn_with_kvcache(
            q[:, None],  # [sequences, 1, heads, head_dim]
            keys,
            values,
            cache_seqlens=plan.contexts,
            block_table=plan.tables,
            causal=True,
            window_size=seen,
        )[:, 0]
