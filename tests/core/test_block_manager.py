"""Blocks: free ones first and lowest first, all or nothing, shared only when known."""

import pytest

from executor_svc.core.block_manager import BlockManager

TOKENS = list(range(100))


def table_of(blocks: BlockManager, num_tokens: int) -> list[int]:
    table: list[int] = []
    assert blocks.grow(table, num_tokens)
    return table


def publish(blocks: BlockManager, table: list[int], token_ids: list[int] = TOKENS) -> None:
    for index in range(len(table)):
        blocks.publish(table, index, token_ids, "")


def test_tables_grow_by_whole_blocks() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    table = table_of(blocks, 1)
    assert table == [0]
    assert blocks.grow(table, 4)
    assert table == [0]
    assert blocks.grow(table, 9)
    assert table == [0, 1, 2]
    assert blocks.num_free == 1


def test_growing_is_all_or_nothing() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    table: list[int] = []
    assert not blocks.grow(table, 9)
    assert table == []
    assert blocks.num_free == 2


def test_a_table_never_shrinks_by_growing() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    table = table_of(blocks, 8)
    assert blocks.grow(table, 1)
    assert table == [0, 1]


def test_released_blocks_are_used_again_lowest_first() -> None:
    blocks = BlockManager(num_blocks=3, block_size=1)
    first, second = table_of(blocks, 2), table_of(blocks, 1)
    blocks.release(first)
    assert first == []
    blocks.grow(second, 3)
    assert second == [2, 0, 1]


def test_giving_back_twice_is_our_own_fault() -> None:
    blocks = BlockManager(num_blocks=1, block_size=1)
    table = table_of(blocks, 1)
    copy = list(table)
    blocks.release(table)
    with pytest.raises(AssertionError, match="twice"):
        blocks.release(copy)


def test_known_blocks_are_shared_and_free_only_when_nobody_is_left() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    first = table_of(blocks, 4)
    publish(blocks, first)
    found = blocks.find(TOKENS, "", max_tokens=5)
    assert found == [0, 1]
    assert blocks.num_used(found) == 2
    second: list[int] = []
    blocks.share(second, found)
    assert blocks.num_free == 2
    blocks.release(first)
    assert blocks.num_free == 2
    blocks.release(second)
    assert (blocks.num_free, blocks.num_cached) == (4, 2)


def test_a_hit_has_whole_blocks_within_the_limit() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    publish(blocks, table_of(blocks, 6))
    assert [len(blocks.find(TOKENS, "", n)) for n in (0, 1, 2, 3, 4, 5)] == [0, 0, 1, 1, 2, 2]


def test_unknown_blocks_go_first_then_the_least_recently_used_tail_first() -> None:
    blocks = BlockManager(num_blocks=5, block_size=1)
    old, new = table_of(blocks, 2), table_of(blocks, 2)
    publish(blocks, old, [10, 11])
    publish(blocks, new, [20, 21])
    blocks.release(old)
    blocks.release(new)
    assert table_of(blocks, 1) == [4]
    assert blocks.num_cached == 4
    assert table_of(blocks, 1) == [1]  # the tail of the old one
    assert blocks.find([10, 11], "", 2) == [0]
    assert table_of(blocks, 2) == [0, 3]
    assert blocks.find([10, 11], "", 2) == []
    assert blocks.find([20, 21], "", 2) == [2]


def test_using_a_block_keeps_it_from_eviction() -> None:
    blocks = BlockManager(num_blocks=2, block_size=1)
    first = table_of(blocks, 1)
    publish(blocks, first, [10])
    blocks.release(first)
    second = table_of(blocks, 1)
    assert second == [1]
    publish(blocks, second, [20])
    blocks.release(second)
    blocks.share(first, blocks.find([10], "", 1))
    blocks.release(first)  # now the last one to be used
    assert table_of(blocks, 1) == [1]
    assert blocks.find([10], "", 1) == [0]


def test_equal_content_is_kept_once() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    first, second = table_of(blocks, 4), table_of(blocks, 4)
    publish(blocks, first)
    publish(blocks, second)
    assert first == second == [0, 1]
    assert blocks.num_free == 2
    blocks.release(second)
    assert blocks.num_used(first) == 2


def test_content_that_is_not_sound_is_forgotten_but_for_what_others_use() -> None:
    blocks = BlockManager(num_blocks=4, block_size=1)
    first = table_of(blocks, 3)
    publish(blocks, first)
    second: list[int] = []
    blocks.share(second, blocks.find(TOKENS, "", 1))
    blocks.release(first, is_sound=False)
    assert blocks.find(TOKENS, "", 3) == second == [0]
    blocks.release(second)
    assert blocks.num_free == blocks.num_blocks
