"""What an attention backend does: plan once for each step, run once for each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How the tokens of a step lie: the chunks one after the other, without padding.

    Chunk i has ``query_lens[i]`` new tokens; they are the last of ``context_lens[i]`` tokens,
    whose keys and values are in the blocks of ``block_tables[i]``. A chunk with one new token and
    no context is a dummy, which fills a step up to the size of a CUDA graph: its slot is negative,
    nothing is stored for it, and its row comes out 0. Only backends that support graphs get some.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[list[int]]
    kv_slot_mapping: Tensor  # [tokens]: where the keys and values of the new tokens go


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most that a step may hold; buffers that stay are as large as that."""

    max_num_seqs: int
    max_num_tokens: int
    max_context_tokens: int


class StoreTarget(NamedTuple):
    """Where the keys and values of a step's tokens go in one layer of a paged cache."""

    slots: Tensor  # [tokens]; a negative one stores nothing
    keys: Tensor  # [blocks, block_size, kv_heads, head_dim]; values likewise
    values: Tensor


class Paged(Protocol):
    """A backend whose cache a kernel of the decoder may fill."""

    def target(self, layer_index: int) -> StoreTarget: ...

    def attend(self, layer_index: int, q: Tensor) -> Tensor:
        """``AttentionBackend.run``, once keys and values are stored."""
        ...


class AttentionBackend(Protocol):
    """Causal attention over a paged KV cache that the backend was built with.

    Each layer may have a sliding window (``windows.py``); it is built with them as well.
    """

    @property
    def name(self) -> str:
        """Its name in the setting ``attention_backend``."""
        ...

    @property
    def numerics(self) -> str:
        """All choices that a result's bits depend on: equal engines, equal text."""
        ...

    @property
    def supports_graphs(self) -> bool:
        """Decode steps may be captured: what ``run`` reads stays where it is."""
        ...

    @property
    def paged(self) -> Paged | None:
        """Itself, if the decoder may store keys and values for it; None if only ``run`` does."""
        ...

    @property
    def can_replay(self) -> bool:
        """The planned step launches just what any decode step of as many chunks launches."""
        ...

    def plan(self, layout: StepLayout) -> None:
        """Prepare a step: everything that is the same in all layers."""
        ...

    def run(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, then attend; rows past the step's tokens are padding and come out 0.

        q is [rows, heads, head_dim], k and v are [rows, kv_heads, head_dim]; the result is
        [rows, heads * head_dim].
        """
        ...
