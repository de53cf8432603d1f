"""A step's numbers as they lie on the host, before they go to the device.

A sequence's last token may be ``PENDING``: drawn by the step before, which the host has not looked
at yet. Such a token goes from the one step to the other on the device.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from executor_svc.core.batcher import Chunk
from executor_svc.torch_engine.attention.base import StepLayout
from executor_svc.torch_engine.kv_cache import kv_slots

PENDING = -1  # in the place of a token id


@dataclass(frozen=True, slots=True)
class HostStep:
    """The tokens of all chunks, one after the other; int64."""

    token_ids: np.ndarray  # [tokens]; positions and slots likewise
    positions: np.ndarray
    slots: np.ndarray
    query_lens: list[int]  # of each chunk; what follows likewise
    context_lens: list[int]
    block_tables: list[list[int]]

    @staticmethod
    def of(chunks: Rows[Chunk], block_size: int) -> "HostStep":
        token_ids: list[int] = []
        positions, slots = [], []
        for chunk in chunks:
            end = chunk.start + chunk.num_tokens
            token_ids += chunk.sequence.token_ids[chunk.start : end]
            positions.append(np.arange(chunk.start, end))
            slots.append(kv_slots(chunk.sequence.block_table, chunk.start, end, block_size))
        return HostStep(
            token_ids=np.array(token_ids),
            positions=np.concatenate(positions),
            slots=np.concatenate(slots),
            query_lens=[chunk.num_tokens for chunk in chunks],
            context_lens=[chunk.start + chunk.num_tokens for chunk in chunks],
            block_tables=[chunk.sequence.block_table for chunk in chunks],
        )

    @staticmethod
    def of_dummies(count: int) -> "HostStep":
        """Chunks that compute nothing of worth and store nothing; see ``StepLayout``."""
        zeros = np.zeros(count, dtype=np.int64)
        return HostStep(zeros, zeros, zeros - 1, [1] * count, [0] * count, [[]] * count)

    @property
    def is_decode(self) -> bool:
        """Each chunk has one token."""
        return len(self.token_ids) == len(self.query_lens)

    def with_dummies(self, num_chunks: int) -> "HostStep":
        """The step, filled up to so many chunks."""
        more = HostStep.of_dummies(num_chunks - len(self.query_lens))
        return HostStep(
            token_ids=np.concatenate([self.token_ids, more.token_ids]),
            positions=np.concatenate([self.positions, more.positions]),
            slots=np.concatenate([self.slots, more.slots]),
            query_lens=self.query_lens + more.query_lens,
            context_lens=self.context_lens + more.context_lens,
            block_tables=self.block_tables + more.block_tables,
        )

    def layout(self, kv_slot_mapping: Tensor) -> StepLayout:  # [tokens], on the device
        return StepLayout(self.query_lens, self.context_lens, self.block_tables, kv_slot_mapping)
