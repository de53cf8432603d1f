"""Who computes what in a step, by example; tests/machine has random histories."""

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


def test_decodes_advance_in_every_step_beside_a_long_prompt() -> None:
    batcher = make_batcher(num_blocks=200, budget=8)
    for key in (1, 2, 3):
        batcher.add(make_sequence(key, 1))
    draw_tokens(batcher.schedule())
    batcher.add(make_sequence(4, 400))
    for step in range(40):
        chunks = batcher.schedule()
        assert [chunk.sequence.key for chunk in chunks] == [1, 2, 3, 4]
        assert chunks[-1].start == 5 * step
        draw_tokens(chunks)


def test_prefill_advances_however_many_decode() -> None:
    batcher = make_batcher(max_num_seqs=8, budget=8)
    for key in range(7):
        batcher.add(make_sequence(key, 1))
    draw_tokens(batcher.schedule())
    batcher.add(make_sequence(7, 30))
    for step in range(30):
        chunks = batcher.schedule()
        assert seen(chunks[-1:]) == [(7, step, 1, step == 29)]
        draw_tokens(chunks)


# --- the prefix cache


def run_step(batcher: Batcher) -> list[Chunk]:
    chunks = batcher.schedule()
    batcher.complete(chunks)
    draw_tokens(chunks)
    return chunks


def finish(batcher: Batcher, sequence: Sequence) -> None:
    batcher.add(sequence)
    while not run_step(batcher)[-1].is_last:
        pass
    batcher.remove(sequence)


def test_a_known_beginning_is_not_computed_again() -> None:
    batcher = make_batcher(block_size=4, budget=16)
    finish(batcher, make_sequence(1, 14))
    batcher.add(make_sequence(2, 30))
    assert seen(run_step(batcher)) == [(2, 12, 16, False)]


def test_one_token_at_least_is_computed() -> None:
    batcher = make_batcher(block_size=4, budget=16)
    finish(batcher, make_sequence(1, 8))
    batcher.add(make_sequence(2, 8))
    assert seen(run_step(batcher)) == [(2, 4, 4, True)]


def test_what_must_be_seen_is_computed() -> None:
    batcher = make_batcher(block_size=4, budget=32)
    finish(batcher, make_sequence(1, 30))
    for key, most in ((2, 0), (3, 7), (4, 100)):
        sequence = make_sequence(key, 20)
        sequence.max_cached_tokens = most
        finish(batcher, sequence)
        assert sequence.num_cached_tokens == min(most // 4 * 4, 16)


def test_salts_share_nothing() -> None:
    batcher = make_batcher(block_size=4)
    finish(batcher, make_sequence(1, 12))
    other = make_sequence(2, 12)
    other.salt = "another tenant"
    batcher.add(other)
    assert seen(run_step(batcher)) == [(2, 0, 12, True)]


def test_without_a_cache_all_is_computed() -> None:
    blocks = BlockManager(100, 4)
    batcher = Batcher(
        blocks, max_num_seqs=8, max_num_batched_tokens=16, enable_prefix_caching=False
    )
    finish(batcher, make_sequence(1, 12))
    batcher.add(make_sequence(2, 12))
    assert seen(run_step(batcher)) == [(2, 0, 12, True)]
    assert blocks.num_cached == 0


def test_output_is_cached_too() -> None:
    batcher = make_batcher(block_size=4)
    turn = make_sequence(1, 5)
    batcher.add(turn)
    for _ in range(5):
        run_step(batcher)
    batcher.remove(turn)  # of its 10 tokens 9 are computed
    batcher.add(make_sequence(2, 12))
    assert seen(run_step(batcher)) == [(2, 8, 4, True)]


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks() -> None:
    batcher = make_batcher(num_blocks=6, block_size=4, budget=32)
    first, second = make_sequence(1, 12), make_sequence(2, 11)
    second.salt = "shares nothing"
    batcher.add(first)
    batcher.add(second)
    run_step(batcher)
    run_step(batcher)  # the first one takes a block from the second one
    assert batcher.num_preemptions == 1
    batcher.remove(first)
    assert seen(run_step(batcher)) == [(2, 8, 4, True)]


def test_samples_of_a_lease_compute_their_prompt_once() -> None:
    batcher = make_batcher(block_size=4, budget=100)
    samples = [make_sequence(key, 26) for key in range(4)]
    for sample in samples[1:]:
        sample.leader = samples[0]
    for sample in samples:
        batcher.add(sample)
    batcher.add(make_sequence(9, 3))
    # The others wait for the leader, and whoever comes after them does not.
    assert seen(run_step(batcher)) == [(0, 0, 26, True), (9, 0, 3, True)]
    assert seen(run_step(batcher)) == [
        (0, 26, 1, True),
        (9, 3, 1, True),
        (1, 24, 2, True),
        (2, 24, 2, True),
        (3, 24, 2, True),
    ]
    assert batcher.blocks.num_used(samples[3].block_table) == 7
    assert {tuple(sample.block_table[:6]) for sample in samples} == {(0, 1, 2, 3, 4, 5)}


def test_samples_of_a_short_prompt_wait_for_nobody() -> None:
    batcher = make_batcher(block_size=4)
    leader, other = make_sequence(0, 4), make_sequence(1, 4)
    other.leader = leader
    batcher.add(leader)
    batcher.add(other)
    assert seen(run_step(batcher)) == [(0, 0, 4, True), (1, 0, 4, True)]


def test_samples_go_on_when_their_leader_was_preempted_or_has_ended() -> None:
    batcher = make_batcher(num_blocks=7, block_size=4, budget=100)
    oldest, leader, other = make_sequence(0, 12), make_sequence(1, 12), make_sequence(2, 12)
    oldest.salt = "shares nothing"
    other.leader = leader
    for sequence in (oldest, leader, other):
        batcher.add(sequence)
    batcher.schedule()  # and never completed, as if the step had gone wrong
    batcher.complete([])
    draw_tokens([Chunk(leader, 0, 12, is_last=True), Chunk(oldest, 0, 12, is_last=True)])
    assert [chunk.sequence.key for chunk in run_step(batcher)] == [0]
    assert batcher.num_preemptions == 1
    batcher.remove(oldest)
    assert [chunk.sequence.key for chunk in run_step(batcher)] == [1]
    batcher.remove(leader)
    assert seen(run_step(batcher)) == [(2, 8, 4, True)]


def test_a_step_that_was_not_completed_leaves_nothing_in_the_cache() -> None:
    batcher = make_batcher(block_size=4)
    sequence = make_sequence(1, 12)
    batcher.add(sequence)
    batcher.schedule()
    batcher.remove(sequence, is_sound=False)
    assert batcher.blocks.num_cached == 0
