"""One token stream inside the engine.

Rule: a sequence has no phase. It has tokens, and the first ``num_computed_tokens`` of them have
their keys and values in its blocks. Prefill, decode, recompute after a preemption and what is left
to do after a prefix hit are all the same work: compute the rest. When nothing is left to compute,
the next token can be drawn.
"""

from dataclasses import dataclass, field
from typing import Self

from executor_svc.core.engine import SamplingParams, SequenceEnd
from executor_svc.core.stopping import StopRules


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one sample of a lease; compared by identity."""

    key: int
    lease_key: int
    sample: int
    params: SamplingParams
    stops: StopRules
    token_ids: list[int]  # the prompt, then the output
    num_prompt_tokens: int
    # Shares blocks with sequences of the same salt only.
    salt: str = ""
    # Another sample of its lease, which computes the prompt for both.
    leader: Self | None = None
    # Tokens from here on must be computed, since somebody wants to see their logits.
    max_cached_tokens: int | None = None

    # The batcher's.
    num_computed_tokens: int = 0  # at most len(token_ids)
    num_published_blocks: int = 0  # the first ones of block_table; others may share them
    num_cached_tokens: int = 0  # computed already when it last joined
    block_table: list[int] = field(default_factory=list)
    arrival: int = 0  # the larger, the younger
    min_free_blocks: int = 0  # it cannot join with fewer

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    def append(self, token_id: int, piece: bytes) -> SequenceEnd | None:
        """Add the next output token, whose text is ``piece``; the end, if it is the last one."""
        index = self.num_output_tokens
        self.token_ids.append(token_id)
        return self.stops.check(self.key, index, token_id, piece)
