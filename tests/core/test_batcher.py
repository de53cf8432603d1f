"""Who computes what in a step; first by example, then against random histories."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from executor_svc.core.batcher import Batcher, Chunk
from executor_svc.core.block_manager import BlockManager
from executor_svc.core.engine import SamplingParams
from executor_svc.core.sequence import Sequence
from executor_svc.core.stopping import StopRules


def make_batcher(
    num_blocks: int = 100, block_size: int = 4, max_num_seqs: int = 8, budget: int = 16
) -> Batcher:
    blocks = BlockManager(num_blocks, block_size)
    return Batcher(blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)


def make_sequence(key: int, prompt_len: int, max_tokens: int = 50) -> Sequence:
    return Sequence(
        key=key,
        lease_key=key,
        sample=0,
        params=SamplingParams(max_tokens=max_tokens),
        stops=StopRules(max_tokens, 0, frozenset()),
        token_ids=[1] * prompt_len,
        num_prompt_tokens=prompt_len,
    )


def draw_tokens(chunks: list[Chunk]) -> None:
    for chunk in chunks:
        if chunk.is_last:
            chunk.sequence.append(1, b"")


def seen(chunks: list[Chunk]) -> list[tuple[int, int, int, bool]]:
    return [(c.sequence.key, c.start, c.num_tokens, c.is_last) for c in chunks]


def test_long_prompts_are_cut_into_chunks() -> None:
    batcher = make_batcher(budget=16)
    batcher.add(make_sequence(1, 40))
    assert seen(batcher.schedule()) == [(1, 0, 16, False)]
    assert seen(batcher.schedule()) == [(1, 16, 16, False)]
    assert seen(batcher.schedule()) == [(1, 32, 8, True)]


def test_decode_rows_come_first_and_prefill_takes_the_rest() -> None:
    batcher = make_batcher(budget=16)
    batcher.add(make_sequence(1, 3))
    batcher.add(make_sequence(2, 40))
    chunks = batcher.schedule()
    assert seen(chunks) == [(1, 0, 3, True), (2, 0, 13, False)]
    draw_tokens(chunks)
    assert seen(batcher.schedule()) == [(1, 3, 1, True), (2, 13, 15, False)]


def test_seats_are_limited_and_waiting_is_first_come_first_served() -> None:
    batcher = make_batcher(max_num_seqs=2)
    for key in range(3):
        batcher.add(make_sequence(key, 1))
    chunks = batcher.schedule()
    assert [chunk.sequence.key for chunk in chunks] == [0, 1]
    batcher.remove(chunks[0].sequence)
    draw_tokens(chunks[1:])
    assert [chunk.sequence.key for chunk in batcher.schedule()] == [1, 2]


def test_a_sequence_joins_only_with_blocks_for_all_its_tokens() -> None:
    batcher = make_batcher(num_blocks=4, block_size=4, max_num_seqs=2, budget=16)
    batcher.add(make_sequence(1, 12))
    batcher.add(make_sequence(2, 8))
    assert [chunk.sequence.key for chunk in batcher.schedule()] == [1]
    assert batcher.blocks.num_free == 1
    assert batcher.num_waiting == 1


def test_the_youngest_is_preempted_and_computes_all_again() -> None:
    batcher = make_batcher(num_blocks=4, block_size=4)
    for key in (1, 2):
        batcher.add(make_sequence(key, 8))
    draw_tokens(batcher.schedule())
    chunks = batcher.schedule()  # both need a third block, four are there
    assert seen(chunks) == [(1, 8, 1, True)]
    assert batcher.num_preemptions == 1
    batcher.remove(chunks[0].sequence)
    assert seen(batcher.schedule()) == [(2, 0, 9, True)]


def test_removing_frees_blocks_in_either_place() -> None:
    batcher = make_batcher(max_num_seqs=1)
    running, waiting = make_sequence(1, 10), make_sequence(2, 10)
    batcher.add(running)
    batcher.add(waiting)
    batcher.schedule()
    batcher.remove(waiting)
    batcher.remove(running)
    assert batcher.blocks.num_free == batcher.blocks.num_blocks
    assert batcher.schedule() == []


class BatcherMachine(RuleBasedStateMachine):
    """Sequences come, compute, end and are aborted under few blocks and a small budget."""

    NUM_BLOCKS, BLOCK_SIZE, SEATS, BUDGET = 6, 3, 4, 5

    def __init__(self) -> None:
        super().__init__()
        self.batcher = make_batcher(self.NUM_BLOCKS, self.BLOCK_SIZE, self.SEATS, self.BUDGET)
        self.live: list[Sequence] = []  # by arrival
        self.num_made = 0

    @rule(prompt_len=st.integers(1, 12), max_tokens=st.integers(1, 6))
    def add(self, prompt_len: int, max_tokens: int) -> None:
        sequence = make_sequence(self.num_made, prompt_len, max_tokens)
        self.num_made += 1
        self.batcher.add(sequence)
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        self.batcher.remove(sequence)

    @rule()
    def step(self) -> None:
        before = {s.key: s.num_computed_tokens for s in self.live}
        oldest = self.live[0] if self.live else None
        chunks = self.batcher.schedule()
        assert sum(chunk.num_tokens for chunk in chunks) <= self.BUDGET
        assert len({chunk.sequence.key for chunk in chunks}) == len(chunks) <= self.SEATS
        if oldest is not None:
            assert chunks[0].num_tokens > 0
            assert any(chunk.sequence is oldest for chunk in chunks), "the oldest must advance"
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
            assert chunk.start == before[sequence.key], "a preempted sequence was still run"
            assert sequence.num_computed_tokens == end
            assert end <= len(sequence.block_table) * self.BLOCK_SIZE
            assert chunk.is_last == (end == len(sequence.token_ids))
            if chunk.is_last and sequence.append(1, b"") is not None:
                self.live.remove(sequence)
                self.batcher.remove(sequence)

    @invariant()
    def every_block_has_one_owner(self) -> None:
        owned = [block for sequence in self.live for block in sequence.block_table]
        assert len(owned) == len(set(owned))
        assert len(owned) + self.batcher.blocks.num_free == self.NUM_BLOCKS

    @invariant()
    def everyone_is_somewhere(self) -> None:
        assert self.batcher.num_running + self.batcher.num_waiting == len(self.live)
        assert self.batcher.num_running <= self.SEATS

    def teardown(self) -> None:
        for _ in range(1000):
            if not self.live:
                return
            self.step()
        raise AssertionError("sequences starve")


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
