"""A step as FlashAttention wants it: cumulative lengths and a rectangular block table.

The buffers stay where they are, so a captured graph reads the present step from them. Block size
is a multiple of 256, so even the widest table is small.
"""

import numpy as np
import torch
from torch import Tensor

from executor_svc.torch_engine.attention.base import StepLayout, StepLimits
from executor_svc.torch_engine.staging import Staging


def window_size(window: int | None) -> tuple[int, int]:
    """A causal window as FlashAttention counts it: keys seen to the left and right of the own.

    -1 is all of them. The last query sees the last key.
    """
    return (-1 if window is None else window - 1, 0)


class FlashPlan:
    """Plans steps; the attributes describe the last one."""

    def __init__(self, limits: StepLimits, *, block_size: int, device: torch.device) -> None:
        self._width = -(-limits.max_context_tokens // block_size)
        self._limits = limits
        self._staging = Staging(device)
        n = limits.max_num_seqs
        self._starts = torch.zeros(2 * (n + 1), dtype=torch.int32, device=device)
        self._contexts = torch.zeros(n, dtype=torch.int32, device=device)
        self._tables = torch.zeros(n * self._width, dtype=torch.int32, device=device)
        self._slots = torch.full((limits.max_num_tokens,), -1, device=device)
        self.slots = self._slots[:0]  # [tokens]
        self.num_sequences = 0
        self.max_query_len = 0

    def fill(self, layout: StepLayout) -> None:
        """Take a step's layout to the device."""
        n = self.num_sequences = len(layout.query_lens)
        self.max_query_len = max(layout.query_lens)
        starts = np.zeros((2, n + 1), dtype=np.int32)
        starts[0, 1:] = np.cumsum(layout.query_lens)
        starts[1, 1:] = np.cumsum(layout.context_lens)
        tables = np.zeros((n, self._width), dtype=np.int32)
        for row, table in zip(tables, layout.block_tables, strict=True):
            row[: len(table)] = table
        contexts = np.asarray(layout.context_lens, dtype=np.int32)
        with self._staging.step():
            self._staging.copy(starts.ravel(), out=self._starts)
            self._staging.copy(contexts, out=self._contexts)
            self._staging.copy(tables.ravel(), out=self._tables)
        self.slots = self._slots[: len(layout.kv_slot_mapping)]
        self.slots.copy_(layout.kv_slot_mapping)

    @property
    def num_tokens(self) -> int:
        return len(self.slots)

    @property
    def is_pure_decode(self) -> bool:
        return self.max_query_len == 1

    @property
    def query_starts(self) -> Tensor:  # [sequences + 1]
        return self._starts[: self.num_sequences + 1]

    @property
    def key_starts(self) -> Tensor:  # [sequences + 1]
        return self._starts[self.num_sequences + 1 :][: self.num_sequences + 1]

    @property
    def contexts(self) -> Tensor:  # [sequences]
        return self._contexts[: self.num_sequences]

    @property
    def tables(self) -> Tensor:  # [sequences, most blocks of a sequence]
        return self._tables.view(-1, self._width)[: self.num_sequences]

    @property
    def max_context(self) -> int:
        """A bound that does not change, since the kernel may choose its tiles by it."""
        return self._limits.max_context_tokens
