"""A priority queue whose entries can be changed and removed anywhere.

Rule: every index of the core that answers "which is first" is one of these. An item has one key;
changing or removing it leaves its old heap entry behind as a tombstone, recognised because the
key no longer matches. Tombstones are dropped when they surface, and all at once when they
outnumber the living, so memory stays within a factor and every operation is O(log n) amortised.
Equal keys are ordered by item.
"""

import heapq
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")

_SLACK: Final = 16


class LazyHeap(Generic[Key, Item]):
    """Items by smallest key."""

    def __init__(self) -> None:
        # the truth; the heap holds at least these and some tombstones
        self._keys: dict[Item, Key] = {}
        self._heap: list[tuple[Key, Item]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._keys)

    def key(self, item: Item) -> Key | None:
        """The key of an item, None if it is not there."""
        return self._keys.get(item)

    def set(self, item: Item, key: Key) -> None:
        """Add an item or change its key."""
        if self._keys.get(item) == key:
            return
        self._keys[item] = key
        heapq.heappush(self._heap, (key, item))
        if len(self._heap) > 2 * len(self._keys) + _SLACK:
            self._compact()

    def discard(self, item: Item) -> None:
        """Remove an item if it is there."""
        if (
            self._keys.pop(item, None) is not None
            and len(self._heap) > 2 * len(self._keys) + _SLACK
        ):
            self._compact()

    def peek(self) -> tuple[Key, Item] | None:
        """The first (key, item), which stays."""
        heap, keys = self._heap, self._keys
        while heap:
            key, item = heap[0]
            if keys.get(item) == key:
                return heap[0]
            heapq.heappop(heap)
        return None

    def pop(self) -> tuple[Key, Item] | None:
        """The first (key, item), which goes."""
        first = self.peek()
        if first is not None:
            heapq.heappop(self._heap)
            del self._keys[first[1]]
        return first

    def _compact(self) -> None:
        """Drop the tombstones."""
        self._heap = [(key, item) for item, key in self._keys.items()]
        heapq.heapify(self._heap)
