"""Blocks: lowest first, all or nothing, never owned twice."""

import pytest

from executor_svc.core.block_manager import BlockManager


def test_tables_grow_by_whole_blocks() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    table: list[int] = []
    assert blocks.grow(table, 1)
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
    table: list[int] = []
    assert blocks.grow(table, 8)
    assert blocks.grow(table, 1)
    assert table == [0, 1]


def test_released_blocks_are_used_again_lowest_first() -> None:
    blocks = BlockManager(num_blocks=3, block_size=1)
    first: list[int] = []
    second: list[int] = []
    blocks.grow(first, 2)
    blocks.grow(second, 1)
    blocks.release(first)
    assert first == []
    blocks.grow(second, 3)
    assert second == [2, 0, 1]


def test_giving_back_twice_is_our_own_fault() -> None:
    blocks = BlockManager(num_blocks=1, block_size=1)
    table: list[int] = []
    blocks.grow(table, 1)
    copy = list(table)
    blocks.release(table)
    with pytest.raises(AssertionError, match="twice"):
        blocks.release(copy)
