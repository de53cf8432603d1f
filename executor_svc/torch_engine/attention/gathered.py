"""Prefill by torch's FlashAttention over keys that are gathered from their blocks first.

FlashAttention takes blocks of multiples of 256 only; smaller ones have to be gathered. That is
cheap beside a prefill's arithmetic: a prefix of 4,096 tokens of an 8-billion model is 16.8 MB a
layer, some 11 us of an H100's bandwidth.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from executor_svc.torch_engine.attention.base import StepLayout
from executor_svc.torch_engine.attention.flash_plan import window_size
from executor_svc.torch_engine.kv_cache import PagedKVCache, kv_slots
from executor_svc.torch_engine.staging import Staging
from executor_svc.torch_engine.windows import first_seen

# Up to torch 2.11 heads that share keys need not be announced: what it calls counts them itself.
_GROUPS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


class GatheredPrefill:
    """Attention of the chunks of a step that have more than one query, in layers of one window."""

    def __init__(self, cache: PagedKVCache, window: int | None) -> None:
        self._cache, self._window = cache, window
        self._staging = Staging(cache.keys.device)
        self._max_query_len = 0  # 0: nothing to do in this step
        self._max_keys = 0
        self._rows = self._slots = torch.empty(0, dtype=torch.int64)
        self._query_starts = self._key_starts = torch.empty(0, dtype=torch.int32)

    def plan(self, layout: StepLayout) -> None:
        """Prepare a step, for all layers."""
        starts = np.cumsum([0, *layout.query_lens])
        chunks = [i for i, query_len in enumerate(layout.query_lens) if query_len > 1]
        self._max_query_len = max((layout.query_lens[i] for i in chunks), default=0)
        if not chunks:
            return
        slots = [
            kv_slots(
                layout.block_tables[i],
                first_seen(layout.context_lens[i] - layout.query_lens[i], self._window),
                layout.context_lens[i],
                self._cache.block_size,
            )
            for i in chunks
        ]
        num_keys = [len(part) for part in slots]
        self._max_keys = max(num_keys)
        rows = [np.arange(starts[i], starts[i + 1]) for i in chunks]
        with self._staging.step():
            self._slots = self._staging.copy(np.concatenate(slots))
            self._rows = self._staging.copy(np.concatenate(rows))
            self._query_starts = self._staging.copy(_starts([len(part) for part in rows]))
            self._key_starts = self._staging.copy(_starts(num_keys))

    def run(self, out: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill the chunks' rows of ``out``.

        out and q are [rows, heads, head_dim], keys and values one layer of the cache.
        """
        if not self._max_query_len:
            return
        attended = varlen_attn(
            q[self._rows],
            keys.flatten(0, 1)[self._slots],
            values.flatten(0, 1)[self._slots],
            self._query_starts,
            self._key_starts,
            self._max_query_len,
            self._max_keys,
            window_size=window_size(self._window),
            **_GROUPS,
        )
        assert isinstance(attended, Tensor)  # a tuple only if more is asked for
        out[self._rows] = attended


def _starts(lens: list[int]) -> np.ndarray:
    return np.cumsum([0, *lens]).astype(np.int32)
