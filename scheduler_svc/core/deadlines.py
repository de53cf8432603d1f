"""Everything that happens by time alone.

Rule: a deadline is named by what it ends; setting it again moves it. A request that waits or runs
is the name of its own one, and remembers it: a million of them need no dictionary. A deadline falls
due when its millisecond has come, in order of time and then of setting. Nothing looks at the clock
anywhere else: without Tick nothing expires, except that placement never grants an overdue request.

Theory: nearly every deadline is moved once and then discarded, long before its time. In one heap
those would leave a million tombstones, and clearing them out would stop everything for a second.
So time is cut into shards of a quarter of a second, each a small heap of its own: a shard whose
last deadline goes is dropped whole, and what clearing it costs is bounded by what was set for the
same quarter of a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Final

from scheduler_svc.core.domain import LeaseKey, RequestRecord
from scheduler_svc.core.lazy_heap import LazyHeap

_SHARD_BITS: Final = 8  # of a millisecond: 256 ms
_SLACK: Final = 16


@dataclass(frozen=True, slots=True)
class RevokeDue:
    """An executor should have confirmed a revoke by now."""

    executor_id: str
    lease: LeaseKey


@dataclass(frozen=True, slots=True)
class GraceDue:
    """A lost executor did not come back."""

    executor_id: str


@dataclass(frozen=True, slots=True)
class LoadDue:
    """An ordered load should have been answered by now."""

    executor_id: str


@dataclass(frozen=True, slots=True)
class ReservationDue:
    """A model's reservation is given up."""

    model: str


@dataclass(frozen=True, slots=True)
class ModelDue:
    """Time may have made a place for the head of a model that found none."""

    model: str


@dataclass(frozen=True, slots=True)
class RefusalDue:
    """More of those who wait for a model that nobody can load are to be told."""

    model: str


# A RequestRecord: its clock, queueing or executing, ran out.
Deadline = RequestRecord | RevokeDue | GraceDue | LoadDue | ReservationDue | ModelDue | RefusalDue
# (falls due at, number of the setting, what): the number is unique, so ``what`` is never compared
_Entry = tuple[int, int, Deadline]


class Shard:
    """The deadlines of one stretch of time."""

    __slots__ = ("heap", "num_live")

    def __init__(self) -> None:
        # by time; some are tombstones: moved or discarded since
        self.heap: list[_Entry] = []
        self.num_live = 0


class Deadlines:
    """What falls due when."""

    def __init__(self) -> None:
        # (when, number of the setting) of all but requests
        self._set: dict[Deadline, tuple[int, int]] = {}
        # number of the stretch of time -> its shard; none without a living deadline
        self._shards: dict[int, Shard] = {}
        self._numbers: LazyHeap[int, int] = LazyHeap()
        self._num_set = 0

    def set(self, deadline: Deadline, at_ms: int) -> None:
        """Add or move a deadline."""
        self.discard(deadline)
        number = at_ms >> _SHARD_BITS
        shard = self._shards.get(number)
        if shard is None:
            shard = self._shards[number] = Shard()
            self._numbers.set(number, number)
        self._num_set += 1
        if isinstance(deadline, RequestRecord):
            deadline.due_ms, deadline.due_number = at_ms, self._num_set
        else:
            self._set[deadline] = at_ms, self._num_set
        heappush(shard.heap, (at_ms, self._num_set, deadline))
        shard.num_live += 1

    def discard(self, deadline: Deadline) -> None:
        """It no longer matters."""
        if isinstance(deadline, RequestRecord):
            if deadline.due_number:
                deadline.due_number = 0
                self._bury(deadline.due_ms)
            return
        known = self._set.pop(deadline, None)
        if known is not None:
            self._bury(known[0])

    def at_ms(self, deadline: Deadline) -> int | None:
        """When it falls due, None if it is not set."""
        if isinstance(deadline, RequestRecord):
            return deadline.due_ms if deadline.due_number else None
        known = self._set.get(deadline)
        return None if known is None else known[0]

    def pop_due(self, now_ms: int) -> Deadline | None:
        """The next deadline that has come, removed."""
        first = self._first()
        if first is None or first[0] > now_ms:
            return None
        self.discard(first[2])
        return first[2]

    def next_ms(self) -> int | None:
        """When to look again; may lie in the past."""
        first = self._first()
        return None if first is None else first[0]

    def __iter__(self) -> Iterator[Deadline]:
        for shard in self._shards.values():
            for entry in shard.heap:
                if self._is_live(entry):
                    yield entry[2]

    def _is_live(self, entry: _Entry) -> bool:
        deadline = entry[2]
        if isinstance(deadline, RequestRecord):
            return deadline.due_number == entry[1]
        known = self._set.get(deadline)
        return known is not None and known[1] == entry[1]

    def _first(self) -> _Entry | None:
        number = self._numbers.peek()
        if number is None:
            return None
        heap = self._shards[number[1]].heap
        while not self._is_live(heap[0]):
            heappop(heap)
        return heap[0]

    def _bury(self, at_ms: int) -> None:
        """An entry of then became a tombstone."""
        number = at_ms >> _SHARD_BITS
        shard = self._shards[number]
        shard.num_live -= 1
        if not shard.num_live:
            del self._shards[number]
            self._numbers.discard(number)
        elif len(shard.heap) > 2 * shard.num_live + _SLACK:
            shard.heap = [entry for entry in shard.heap if self._is_live(entry)]
            heapify(shard.heap)
