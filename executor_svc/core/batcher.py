"""Which tokens the next step computes.

Rule: a step has a token budget. Sequences that lack one token (decode rows) are served first,
then the rest of the running ones, then waiting ones join while seats, blocks and budget last;
what does not fit in the budget is cut into chunks. Order is always by arrival.

A sequence joins only when blocks for all its present tokens are free, so prefill chunks never
run out of blocks; decode rows can. Then the youngest running sequence is preempted: its blocks
are taken back and it computes everything again later. The oldest is never preempted for another,
and no sequence may grow past what all blocks hold (the engine's context is no longer than that),
so the oldest always advances and every sequence becomes the oldest at some time.
"""

from collections import deque
from dataclasses import dataclass

from executor_svc.core.block_manager import BlockManager
from executor_svc.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + num_tokens) of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    num_tokens: int
    is_last: bool  # nothing is left to compute afterwards: draw the next token


class Batcher:
    """Owns the sequences that are not finished, and their blocks."""

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        assert 0 < max_num_seqs <= max_num_batched_tokens
        self.blocks = blocks
        self.num_preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._num_arrived = 0
        self._running: list[Sequence] = []  # by arrival; at most max_num_seqs
        self._waiting: deque[Sequence] = deque()  # by arrival, each younger than all running

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self.blocks.release(sequence.block_table)

    def schedule(self) -> list[Chunk]:
        """Hand out the next step's chunks; they count as computed from here on."""
        chunks: list[Chunk] = []
        budget = self._max_num_batched_tokens
        for sequence in [s for s in self._running if s.num_uncomputed_tokens == 1]:
            if self._make_room(sequence):
                budget -= self._take(sequence, budget, chunks)
        for sequence in [s for s in self._running if s.num_uncomputed_tokens > 0]:
            budget -= self._take(sequence, budget, chunks)
        while budget > 0 and (joined := self._join_next()) is not None:
            budget -= self._take(joined, budget, chunks)
        return chunks

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Append the sequence's next chunk, as far as the budget goes; how many tokens it has."""
        num_tokens = min(sequence.num_uncomputed_tokens, budget)
        if num_tokens > 0:
            start = sequence.num_computed_tokens
            sequence.num_computed_tokens += num_tokens
            is_last = sequence.num_uncomputed_tokens == 0
            chunks.append(Chunk(sequence, start, num_tokens, is_last))
        return num_tokens

    def _make_room(self, sequence: Sequence) -> bool:
        """Get blocks for all tokens of a running sequence; False if it was itself preempted.

        Decode rows come in order of arrival, so whoever is preempted here is not yet in the step.
        """
        if sequence.arrival > self._running[-1].arrival:
            return False  # an older row took its blocks a moment ago
        while not self.blocks.grow(sequence.block_table, len(sequence.token_ids)):
            youngest = self._running.pop()
            self.blocks.release(youngest.block_table)
            youngest.num_computed_tokens = 0
            self.num_preemptions += 1
            self._waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _join_next(self) -> Sequence | None:
        """Move the oldest waiting sequence to the running ones, if a seat and blocks are free."""
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return None
        sequence = self._waiting[0]
        if not self.blocks.grow(sequence.block_table, len(sequence.token_ids)):
            return None
        self._running.append(self._waiting.popleft())
        return sequence
