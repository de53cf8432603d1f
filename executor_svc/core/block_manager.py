"""Who owns which block of the KV cache.

Rule: every block is either free or in exactly one block table. A table only grows at its end
and is given back whole. Blocks are handed out lowest number first, so that a table tends to be
made of neighbours, which a backend can read as one run.
"""

import heapq


class BlockManager:
    """Hands out ``num_blocks`` blocks of ``block_size`` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))  # a heap
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Extend the table until it holds ``num_tokens`` tokens; False leaves it as it was."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = heapq.heappop(self._free)
            self._is_free[block] = False
            block_table.append(block)
        return True

    def release(self, block_table: list[int]) -> None:
        """Take all blocks of the table back and leave it empty."""
        for block in block_table:
            assert not self._is_free[block], f"block {block} was given back twice"
            self._is_free[block] = True
            heapq.heappush(self._free, block)
        block_table.clear()
