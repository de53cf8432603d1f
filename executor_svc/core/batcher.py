"""Which tokens the next step computes.

Rule: a step has a token budget. Sequences that lack one token (decode rows) are served first,
then the rest of the running ones, then waiting ones join while seats, blocks and budget last;
what does not fit in the budget is cut into chunks. Order is always by arrival.

A sequence joins only when blocks for all its present tokens are to be had, so prefill chunks never
run out of blocks; decode rows can. Then the youngest running sequence is preempted: its blocks
are taken back and it computes everything again later, but for what the prefix cache still has.
The oldest is never preempted for another, and no sequence may grow past what all blocks hold (the
engine's context is no longer than that), so the oldest always advances and every sequence becomes
the oldest at some time. Decode rows leave budget over, since there are no more seats than budget
and whoever lacks more than one token has a seat too; so they do not starve prefill either.

Whoever joins begins with the blocks that the prefix cache has for it. The last token is always
computed, since the next one is drawn from its row. The samples of a lease let their leader go
ahead until the blocks of their prompt are there; they compute the tail of the prompt that does not
fill a block each for themselves, which needs no copy from block to block and gives the same bits.
Only while they wait for that may younger sequences overtake them.
"""

from bisect import insort
from collections.abc import Sequence as Rows
from typing import NamedTuple

from executor_svc.core.block_manager import BlockManager
from executor_svc.core.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    num_tokens: int
    is_last: bool  # nothing is left to compute afterwards: draw the next token


class Batcher:
    """Owns the sequences that are not finished, and their blocks."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        assert 0 < max_num_seqs <= max_num_batched_tokens
        self.blocks = blocks
        self.num_preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._is_caching = enable_prefix_caching
        self._num_arrived = 0
        self._running: list[Sequence] = []  # by arrival; at most max_num_seqs
        self._waiting: list[Sequence] = []  # by arrival

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

    def remove(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        """Forget a sequence, wherever it is, and free its blocks.

        What it computed stays in the prefix cache, unless it is said not to be sound.
        """
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self.blocks.release(sequence.block_table, is_sound=is_sound)

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

    def complete(self, chunks: Rows[Chunk]) -> None:
        """These chunks were computed: others may share the blocks they filled.

        Their sequences are still here, but may have been preempted meanwhile.
        """
        if not self._is_caching:
            return
        block_size = self.blocks.block_size
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
            num_full = end // block_size
            if num_full <= sequence.num_published_blocks or end > sequence.num_computed_tokens:
                continue
            for index in range(sequence.num_published_blocks, num_full):
                table, token_ids = sequence.block_table, sequence.token_ids
                self.blocks.publish(table, index, token_ids, sequence.salt)
            sequence.num_published_blocks = num_full

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Append the sequence's next chunk, as far as the budget goes; how many tokens it has."""
        start, missing = sequence.num_computed_tokens, sequence.num_uncomputed_tokens
        num_tokens = min(missing, budget)
        if num_tokens > 0:
            sequence.num_computed_tokens = start + num_tokens
            chunks.append(Chunk(sequence, start, num_tokens, num_tokens == missing))
        return num_tokens

    def _make_room(self, sequence: Sequence) -> bool:
        """Get blocks for all tokens of a running sequence; False if it was itself preempted.

        Decode rows come in order of arrival, so whoever is preempted here is not yet in the step.
        """
        if len(sequence.token_ids) <= len(sequence.block_table) * self.blocks.block_size:
            return True
        if sequence.arrival > self._running[-1].arrival:
            return False  # an older row took its blocks a moment ago
        while not self.blocks.grow(sequence.block_table, len(sequence.token_ids)):
            youngest = self._running.pop()
            self.blocks.release(youngest.block_table)
            youngest.num_computed_tokens = youngest.num_published_blocks = 0
            youngest.min_free_blocks = 0
            self.num_preemptions += 1
            insort(self._waiting, youngest, key=_arrival)
            if youngest is sequence:
                return False
        return True

    def _join_next(self) -> Sequence | None:
        """Move the oldest sequence that may join to the running ones, if there is room for it."""
        if len(self._running) >= self._max_num_seqs:
            return None
        for position, sequence in enumerate(self._waiting):
            if self._waits_for_leader(sequence):
                continue
            if not self._find_blocks(sequence):
                return None
            del self._waiting[position]
            insort(self._running, sequence, key=_arrival)
            return sequence
        return None

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        if sequence.leader is None or not self._is_caching:
            return False
        num_shared = (sequence.num_prompt_tokens - 1) // self.blocks.block_size
        return sequence.leader.num_published_blocks < num_shared

    def _find_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all tokens of a waiting sequence, cached ones first; False takes none."""
        blocks = self.blocks
        if blocks.num_free < sequence.min_free_blocks:
            return False  # as an earlier look-up has shown
        num_tokens = len(sequence.token_ids)
        cached = self._cached_blocks(sequence)
        needed = blocks.blocks_for(num_tokens) - blocks.num_used(cached)
        if needed > blocks.num_free:
            sequence.min_free_blocks = needed
            return False
        blocks.share(sequence.block_table, cached)
        is_grown = blocks.grow(sequence.block_table, num_tokens)
        assert is_grown
        sequence.num_published_blocks = len(cached)
        sequence.num_cached_tokens = len(cached) * blocks.block_size
        sequence.num_computed_tokens = sequence.num_cached_tokens
        return True

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        if not self._is_caching:
            return []
        most = len(sequence.token_ids) - 1
        if sequence.max_cached_tokens is not None:
            most = min(most, sequence.max_cached_tokens)
        return self.blocks.find(sequence.token_ids, sequence.salt, most)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
