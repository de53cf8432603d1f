"""Attention by the ``flash-attn`` package (version 2).

Steps with prefill go through ``flash_attn_varlen_func``, pure decode steps through
``flash_attn_with_kvcache``, which splits long contexts over the GPU.
"""

import flash_attn
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from executor_svc.torch_engine.attention.flash_backend import FlashBackend


class FlashAttention(FlashBackend):
    """See the module's text."""

    name = "flash"
    numerics = f"flash_attn {flash_attn.__version__}"

    def _attended(self, q: Tensor, keys: Tensor, values: Tensor, seen: tuple[int, int]) -> Tensor:
        run = self._decode if self._plan.is_pure_decode else self._prefill
        return run(q, keys, values, seen)

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
