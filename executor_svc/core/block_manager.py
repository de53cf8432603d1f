"""Who uses which block of the KV cache.

Rule: a block is free, or some block tables refer to it, or it is idle: none does, but its content
is known to the prefix cache and may be asked for again. Free blocks are handed out first; then
idle ones are evicted, the least recently used first. A table's tail is idle before its head, so a
block outlives what was computed on top of it.

Blocks in several tables are full and never written again. Free blocks are handed out lowest
number first, so that a table tends to be made of neighbours, which a backend can read as one run.
"""

import heapq
from collections.abc import Sequence

from executor_svc.core.prefix_cache import PrefixCache


class BlockManager:
    """Hands out ``num_blocks`` blocks of ``block_size`` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))  # a heap
        self._num_users = [0] * num_blocks  # tables that refer to each block
        self._idle: dict[int, None] = {}  # the least recently used first
        self._cache = PrefixCache(block_size)

    @property
    def num_free(self) -> int:
        """Blocks that no table refers to: all that can be handed out."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks whose content is known, whether in use or idle."""
        return len(self._cache)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, token_ids: Sequence[int], salt: str, max_tokens: int) -> list[int]:
        """The known blocks with the longest beginning of ``token_ids``, at most ``max_tokens``."""
        return self._cache.find(token_ids, salt, max_tokens // self.block_size)

    def num_used(self, blocks: Sequence[int]) -> int:
        """How many of these blocks are in a table already, so that sharing them costs nothing."""
        return sum(self._num_users[block] > 0 for block in blocks)

    def share(self, block_table: list[int], blocks: Sequence[int]) -> None:
        """Begin an empty table with known blocks."""
        assert not block_table
        for block in blocks:
            self._use(block)
        block_table += blocks

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Extend the table until it holds ``num_tokens`` tokens; False leaves it as it was."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        while len(self._free) < missing:
            self._evict()
        for _ in range(missing):
            block = heapq.heappop(self._free)
            self._num_users[block] = 1
            block_table.append(block)
        return True

    def publish(
        self, block_table: list[int], index: int, token_ids: Sequence[int], salt: str
    ) -> None:
        """Block ``index`` of the table is computed, and all before it are known: make it known.

        If another block has the same content already, the table takes that one instead.
        """
        own = block_table[index]
        known = self._cache.add(block_table, index, token_ids, salt)
        if known != own:
            self._use(known)
            block_table[index] = known
            self._leave(own)

    def release(self, block_table: list[int], *, is_sound: bool = True) -> None:
        """Empty a table; if its content is not sound, what nobody else uses is forgotten too."""
        for block in reversed(block_table):
            if not is_sound and self._num_users[block] == 1 and block in self._cache:
                self._cache.drop(block)
            self._leave(block)
        block_table.clear()

    def _use(self, block: int) -> None:
        assert block in self._cache
        if self._num_users[block] == 0:
            del self._idle[block]
        self._num_users[block] += 1

    def _leave(self, block: int) -> None:
        assert self._num_users[block] > 0, f"block {block} was given back twice"
        self._num_users[block] -= 1
        if self._num_users[block] > 0:
            return
        if block in self._cache:
            self._idle[block] = None
        else:
            heapq.heappush(self._free, block)

    def _evict(self) -> None:
        block = next(iter(self._idle))
        del self._idle[block]
        self._cache.drop(block)
        heapq.heappush(self._free, block)
