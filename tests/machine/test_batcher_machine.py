"""Random histories of batcher, blocks and prefix cache, beside a model of what the blocks hold.

The model writes into each slot of each block the whole beginning that its keys and values depend
on. A step that reads a slot with another beginning in it would have drawn from the wrong context.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from executor_svc.core.batcher import Batcher, Chunk
from executor_svc.core.block_manager import BlockManager
from executor_svc.core.engine import SamplingParams
from executor_svc.core.sequence import Sequence
from executor_svc.core.stopping import StopRules

NUM_BLOCKS, BLOCK_SIZE, SEATS, BUDGET = 6, 3, 4, 5
MAX_PROMPT, MAX_TOKENS = 12, 6  # together at most what all blocks hold
MAX_STEPS_PER_SEQUENCE = (MAX_PROMPT + MAX_TOKENS) * 2

Content = tuple[str, tuple[int, ...]]  # salt, tokens up to here


class BatcherMachine(RuleBasedStateMachine):
    """Leases come, compute, end, fail and are aborted under few blocks and a small budget."""

    is_caching = True

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.batcher = Batcher(
            self.blocks,
            max_num_seqs=SEATS,
            max_num_batched_tokens=BUDGET,
            enable_prefix_caching=self.is_caching,
        )
        self.live: list[Sequence] = []  # by arrival
        self.num_made = 0
        self.memory: dict[tuple[int, int], Content] = {}  # by block and place in it

    # Few different tokens and salts, so that beginnings meet.
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_PROMPT),
        max_tokens=st.integers(1, MAX_TOKENS),
        num_samples=st.integers(1, 3),
        salt=st.sampled_from(["", "", "other"]),
        max_cached_tokens=st.sampled_from([None, None, None, 0, 4]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        num_samples: int,
        salt: str,
        max_cached_tokens: int | None,
    ) -> None:
        leader: Sequence | None = None
        for sample in range(num_samples):
            sequence = Sequence(
                key=self.num_made + sample,
                lease_key=self.num_made,
                sample=sample,
                params=SamplingParams(max_tokens=max_tokens),
                stops=StopRules(max_tokens, 0, frozenset()),
                token_ids=list(prompt),
                num_prompt_tokens=len(prompt),
                salt=salt,
                leader=leader,
                max_cached_tokens=max_cached_tokens if leader is None else None,
            )
            leader = leader or sequence
            self.batcher.add(sequence)
            self.live.append(sequence)
        self.num_made += num_samples

    @precondition(lambda self: self.live)
    @rule(data=st.data(), is_sound=st.booleans())
    def end_lease(self, data: st.DataObject, is_sound: bool) -> None:
        """Abort a lease, or let it fail, at any time between two steps."""
        self._end_lease(data.draw(st.sampled_from(self.live)).lease_key, is_sound)

    def _end_lease(self, lease_key: int, is_sound: bool) -> None:
        for sequence in [s for s in self.live if s.lease_key == lease_key]:
            self.live.remove(sequence)
            table = list(sequence.block_table)
            self.batcher.remove(sequence, is_sound=is_sound)
            if not is_sound:
                self._spoil([block for block in table if not self.blocks.num_used([block])])

    def _spoil(self, blocks: list[int]) -> None:
        """Whoever reads these before writing them fails."""
        for slot in [slot for slot in self.memory if slot[0] in blocks]:
            del self.memory[slot]

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        chunks = self._schedule()
        faulty = data.draw(st.sampled_from([None, None, None, *chunks]))
        sound = []
        for chunk in chunks:
            if chunk is not faulty:
                self._compute(chunk)
                sound.append(chunk)
        self.batcher.complete(sound)
        if faulty is not None:
            self._end_lease(faulty.sequence.lease_key, is_sound=False)
        for chunk in sound:
            if chunk.is_last and chunk.sequence in self.live:
                self._append(chunk.sequence, data.draw(st.integers(0, 1)))

    def _schedule(self) -> list[Chunk]:
        running = list(self.batcher._running)
        before = {s.key: s.num_computed_tokens for s in running}
        chunks = self.batcher.schedule()
        assert sum(chunk.num_tokens for chunk in chunks) <= BUDGET
        assert len({chunk.sequence.key for chunk in chunks}) == len(chunks) <= SEATS
        assert all(chunk.num_tokens > 0 for chunk in chunks)
        served = [chunk.sequence for chunk in chunks]
        oldest = (running or self.live)[:1]
        assert all(sequence in served for sequence in oldest), "the oldest must advance"
        for sequence in running:  # who had one token to compute was served or preempted
            if len(sequence.token_ids) - before[sequence.key] == 1:
                assert sequence in served or sequence in self.batcher._waiting
        return chunks

    def _compute(self, chunk: Chunk) -> None:
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        assert sequence.num_computed_tokens == end
        assert chunk.is_last == (end == len(sequence.token_ids))
        if not self.is_caching:
            assert sequence.num_cached_tokens == 0
        if sequence.max_cached_tokens is not None:
            assert sequence.num_cached_tokens <= sequence.max_cached_tokens
        for position in range(chunk.start, end):
            block, place = self._slot(sequence, position)
            assert self.blocks.num_used([block]) == 1
            assert block not in self.blocks._cache, "a known block must not be written"
            self.memory[block, place] = self._content(sequence, position)
        for position in range(end):
            assert self.memory[self._slot(sequence, position)] == self._content(sequence, position)

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE

    def _content(self, sequence: Sequence, position: int) -> Content:
        return sequence.salt, tuple(sequence.token_ids[: position + 1])

    def _append(self, sequence: Sequence, token_id: int) -> None:
        if sequence.append(token_id, b"") is not None:
            self.live.remove(sequence)
            self.batcher.remove(sequence)

    @invariant()
    def every_block_is_in_use_or_idle_or_free(self) -> None:
        num_users = [0] * NUM_BLOCKS
        for sequence in self.live:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            for block in sequence.block_table:
                num_users[block] += 1
        assert num_users == self.blocks._num_users
        used = {block for block, users in enumerate(num_users) if users}
        free, idle = self.blocks._free, self.blocks._idle.keys()
        assert len(free) + len(idle) + len(used) == NUM_BLOCKS
        assert used.union(free, idle) == set(range(NUM_BLOCKS))
        assert all(block in self.blocks._cache for block in idle)
        assert not any(block in self.blocks._cache for block in free)
        assert self.blocks.num_free == NUM_BLOCKS - len(used)

    @invariant()
    def only_full_and_known_blocks_are_shared(self) -> None:
        for sequence in self.live:
            table, published = sequence.block_table, sequence.num_published_blocks
            assert all(block in self.blocks._cache for block in table[:published])
            assert all(block not in self.blocks._cache for block in table[published:])
            assert all(self.blocks._num_users[block] == 1 for block in table[published:])

    @invariant()
    def a_known_block_holds_what_its_key_says(self) -> None:
        cache = self.blocks._cache
        block_of = {number: block for block, (number, _) in cache._known.items()}
        for block, (_, (before, tokens)) in cache._known.items():
            salt, beginning = self.memory[block, BLOCK_SIZE - 1]
            assert beginning[-BLOCK_SIZE:] == tokens
            if isinstance(before, str):
                assert (salt, beginning) == (before, tokens)
            elif before in block_of:  # else it is out of reach
                held = self.memory[block_of[before], BLOCK_SIZE - 1]
                assert held == (salt, beginning[:-BLOCK_SIZE])

    @invariant()
    def everyone_is_in_one_place_by_arrival(self) -> None:
        running, waiting = self.batcher._running, self.batcher._waiting
        assert sorted((*running, *waiting), key=lambda s: s.arrival) == self.live
        for place in (running, waiting):
            assert [s.arrival for s in place] == sorted(s.arrival for s in place)
        assert len(running) <= SEATS
        for sequence in waiting:
            assert not sequence.block_table
            assert sequence.num_computed_tokens == sequence.num_published_blocks == 0

    def teardown(self) -> None:
        """Nobody starves: what is there ends, in a number of steps that the work explains."""
        for _ in range(MAX_STEPS_PER_SEQUENCE * len(self.live)):
            for chunk in (chunks := self._schedule()):
                self._compute(chunk)
            self.batcher.complete(chunks)
            for chunk in chunks:
                if chunk.is_last:
                    self._append(chunk.sequence, chunk.sequence.key % 2)
        assert not self.live, "sequences starve"
        assert self.blocks.num_free == NUM_BLOCKS


class UncachedBatcherMachine(BatcherMachine):
    """The same without a prefix cache."""

    is_caching = False


TestBatcher = BatcherMachine.TestCase
TestUncachedBatcher = UncachedBatcherMachine.TestCase
TestBatcher.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestUncachedBatcher.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
