"""Attention by the FlashAttention that torch brings (torch 2.12 and newer): ``varlen_attn``.

It reads the paged cache through block tables, in pages of multiples of 256, for prefill and decode
alike. How it splits long contexts over the GPU depends on what is in the step, so it is not for
exact engines.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from executor_svc.torch_engine.attention.base import StepLayout, StepLimits
from executor_svc.torch_engine.attention.flash_plan import FlashPlan, window_size
from executor_svc.torch_engine.attention.paged import PagedBackend
from executor_svc.torch_engine.kv_cache import PagedKVCache
from executor_svc.torch_engine.windows import Windows


class TorchFlashAttention(PagedBackend):
    """See the module's text."""

    name = "torch"
    supports_graphs = True

    numerics = f"torch {torch.__version__} varlen_attn"

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
        attended = varlen_attn(
            q[: plan.num_tokens],
            keys,
            values,
            plan.query_starts,
            plan.key_starts,
            plan.max_query_len,
            plan.max_context,
            window_size=window_size(self._windows[layer_index]),
            enable_gqa=True,
            seqused_k=plan.contexts,
            block_table=plan.tables,
        )
        assert isinstance(attended, Tensor)  # a tuple only if more is asked for
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        out[: plan.num_tokens] = attended
        return out.flatten(1)
