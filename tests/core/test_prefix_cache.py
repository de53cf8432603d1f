"""Content to blocks: longest beginning, whole keys, salts apart."""

from executor_svc.core.prefix_cache import PrefixCache

TOKENS = [1, 2, 3, 4, 5, 6, 7]


def filled(token_ids: list[int], blocks: list[int], salt: str = "") -> PrefixCache:
    cache = PrefixCache(block_size=2)
    for index in range(len(blocks)):
        assert cache.add(blocks, index, token_ids, salt) == blocks[index]
    return cache


def test_the_longest_known_beginning_is_found() -> None:
    cache = filled(TOKENS, [7, 3, 5])
    assert cache.find(TOKENS, "", max_blocks=3) == [7, 3, 5]
    assert cache.find([*TOKENS[:4], 9, 9], "", max_blocks=3) == [7, 3]
    assert cache.find([9, *TOKENS[1:]], "", max_blocks=3) == []
    assert cache.find(TOKENS, "", max_blocks=2) == [7, 3]
    assert cache.find(TOKENS, "", max_blocks=0) == []


def test_equal_tokens_after_another_beginning_are_another_content() -> None:
    cache = filled([1, 1, 5, 6], [0, 1])
    assert cache.find([2, 2, 5, 6], "", max_blocks=2) == []
    other = [2, 3]
    assert cache.add(other, 0, [2, 2, 5, 6], "") == 2
    assert cache.add(other, 1, [2, 2, 5, 6], "") == 3
    assert cache.find([2, 2, 5, 6], "", max_blocks=2) == [2, 3]
    assert cache.find([1, 1, 5, 6], "", max_blocks=2) == [0, 1]


def test_salts_share_nothing() -> None:
    cache = filled(TOKENS, [7, 3, 5], salt="alice")
    assert cache.find(TOKENS, "bob", max_blocks=3) == []
    assert cache.find(TOKENS, "", max_blocks=3) == []
    assert cache.add([0], 0, TOKENS, "bob") == 0
    assert cache.find(TOKENS, "bob", max_blocks=3) == [0]


def test_a_content_keeps_its_first_block() -> None:
    cache = filled(TOKENS, [7, 3])
    assert cache.add([4], 0, TOKENS, "") == 7
    assert len(cache) == 2
    assert 4 not in cache


def test_what_comes_after_a_dropped_block_is_out_of_reach() -> None:
    cache = filled(TOKENS, [7, 3, 5])
    cache.drop(3)
    assert cache.find(TOKENS, "", max_blocks=3) == [7]
    assert 5 in cache
    # The same content comes again, in another block: what was built on the old one stays away.
    assert cache.add([7, 2], 1, TOKENS, "") == 2
    assert cache.find(TOKENS, "", max_blocks=3) == [7, 2]
    cache.drop(5)
    assert 5 not in cache
