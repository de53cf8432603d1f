"""Which blocks hold which tokens, so that a beginning that many share is computed once.

Rule: only full blocks are known, each by its content: its own tokens and all tokens before them.
The key of a block is (number of the block before it, its tokens); the first one has the salt
there, so that nothing is shared between salts. Keys are compared whole, never by a hash alone, so
one content cannot pass for another. Numbers are never used twice: what comes after a block that
was dropped is out of reach until it is dropped too, but never wrong.
"""

from collections.abc import Sequence

_Key = tuple[int | str, tuple[int, ...]]


class PrefixCache:
    """Maps content to blocks; who uses a block, and when it goes, is its owner's business."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._block_of: dict[_Key, int] = {}
        self._known: dict[int, tuple[int, _Key]] = {}  # by block: its number and its key
        self._num_added = 0

    def __contains__(self, block: int) -> bool:
        return block in self._known

    def __len__(self) -> int:
        return len(self._known)

    def find(self, token_ids: Sequence[int], salt: str, max_blocks: int) -> list[int]:
        """The blocks that hold the longest known beginning of ``token_ids``."""
        blocks: list[int] = []
        before: int | str = salt
        while len(blocks) < max_blocks:
            block = self._block_of.get((before, self._tokens(token_ids, len(blocks))))
            if block is None:
                break
            blocks.append(block)
            before, _ = self._known[block]
        return blocks

    def add(
        self, block_table: Sequence[int], index: int, token_ids: Sequence[int], salt: str
    ) -> int:
        """Make block ``index`` of a table known; all blocks before it are.

        Returns the block that now stands for the content: this one, or one that did so before.
        """
        before = salt if index == 0 else self._known[block_table[index - 1]][0]
        key = (before, self._tokens(token_ids, index))
        block = self._block_of.setdefault(key, block_table[index])
        if block not in self._known:
            self._known[block] = (self._num_added, key)
            self._num_added += 1
        return block

    def drop(self, block: int) -> None:
        """Forget a block that is known."""
        _, key = self._known.pop(block)
        del self._block_of[key]

    def _tokens(self, token_ids: Sequence[int], index: int) -> tuple[int, ...]:
        """The tokens of the block with this index; fewer than a block where they end."""
        start = index * self._block_size
        return tuple(token_ids[start : start + self._block_size])
