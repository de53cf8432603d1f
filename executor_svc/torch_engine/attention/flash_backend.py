"""What both FlashAttentions have in common: the plan, the buffers and the rows of dummies.

Block sizes are multiples of 256. How they choose tiles and split long contexts over the GPU depends
on what is in the step, so they are not for exact engines.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from executor_svc.torch_engine.attention.base import StepLayout, StepLimits
from executor_svc.torch_engine.attention.flash_plan import FlashPlan, window_size
from executor_svc.torch_engine.attention.paged import PagedBackend
from executor_svc.torch_engine.kv_cache import PagedKVCache
from executor_svc.torch_engine.windows import Windows


class FlashBackend(PagedBackend):
    """A backend that reads the paged cache by a ``FlashPlan``."""

    supports_graphs = True

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
        num_tokens = self._plan.num_tokens
        keys, values = self._cache.keys[layer_index], self._cache.values[layer_index]
        seen = window_size(self._windows[layer_index])
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        out[:num_tokens] = self._attended(q[:num_tokens], keys, values, seen)
        return out.flatten(1)

    @abstractmethod
    def _attended(self, q: Tensor, keys: Tensor, values: Tensor, seen: tuple[int, int]) -> Tensor:
        """Of the planned step, [tokens, heads, head_dim]; ``seen`` as ``window_size`` gives it."""
