"""What an attention backend does: plan once for each step, run once for each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How the tokens of a step lie: the chunks one after the other, without padding.

    Chunk i has ``query_lens[i]`` new tokens; they are the last of ``context_lens[i]`` tokens,
    whose keys and values are in the blocks of ``block_tables[i]``.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[list[int]]
    kv_slot_mapping: Tensor  # [tokens]: where the keys and values of the new tokens go


class AttentionBackend(Protocol):
    """Causal attention over a paged KV cache that the backend was built with."""

    def plan(self, layout: StepLayout) -> None:
        """Prepare a step: everything that is the same in all layers."""
        ...

    def run(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, then attend; rows past the step's tokens are padding and come out 0.

        q is [rows, heads, head_dim], k and v are [rows, kv_heads, head_dim]; the result is
        [rows, heads * head_dim].
        """
        ...
