"""Everything that happens by time alone.

Rule: a deadline is named by what it ends; setting it again moves it. A request that waits or runs
is the name of its own one, and remembers it: a million of them need no dictionary. A deadline falls
due when its millisecond has come, in order of time and then of setting. Nothing looks at the clock
anywhere else: without Tick nothing expires, except that placement never grants an overdue request.

Theory: nearly every deadline of a request is moved once and then discarded, long before its time.
In one heap those would leave a million tombstones, and clearing them out would stop everything for
a second. So time is cut into shards of a quarter of a second. A shard is a list without order until
it is the first of all, and only then a heap is made of it: of what is left, mostly nothing.
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


Due = RevokeDue | GraceDue | LoadDue | ReservationDue | ModelDue | RefusalDue
# A RequestRecord: its clock, queueing or executing, ran out.
Deadline = RequestRecord | Due
# when, and the number of the setting, which is unique: what falls due is never compared
_Key = tuple[int, int]


class Shard:
    """The requests whose clocks run out in one stretch of time."""

    __slots__ = ("heap", "records")

    def __init__(self) -> None:
        # each knows its place here
        self.records: list[RequestRecord] = []
        # the same by time, if anybody asked; some are tombstones: moved or discarded since
        self.heap: list[tuple[_Key, RequestRecord]] | None = None

    def add(self, record: RequestRecord) -> None:
        """Its clock runs out in this stretch."""
        record.due_place = len(self.records)
        self.records.append(record)
        if self.heap is not None:
            heappush(self.heap, ((record.due_ms, record.due_number), record))

    def remove(self, record: RequestRecord) -> None:
        """The last one takes its place; its entry in the heap becomes a tombstone."""
        last = self.records.pop()
        if last is not record:
            self.records[record.due_place] = last
            last.due_place = record.due_place
        record.due_number = 0
        if self.heap is not None and len(self.heap) > 2 * len(self.records) + _SLACK:
            self.heap = None

    def first(self) -> RequestRecord:
        """Whose clock runs out first; there must be somebody."""
        if len(self.records) == 1:
            return self.records[0]
        if self.heap is None:
            self.heap = [((each.due_ms, each.due_number), each) for each in self.records]
            heapify(self.heap)
        (_, number), record = self.heap[0]
        while record.due_number != number:
            heappop(self.heap)
            (_, number), record = self.heap[0]
        return record


class Deadlines:
    """What falls due when."""

    def __init__(self) -> None:
        # all but requests: few
        self._others: LazyHeap[_Key, Due] = LazyHeap()
        # number of the stretch of time -> its shard; no empty ones
        self._shards: dict[int, Shard] = {}
        self._numbers: LazyHeap[int, int] = LazyHeap()
        self._num_set = 0

    def set(self, deadline: Deadline, at_ms: int) -> None:
        """Add or move a deadline."""
        self._num_set += 1
        if not isinstance(deadline, RequestRecord):
            self._others.set(deadline, (at_ms, self._num_set))
            return
        self.discard(deadline)
        deadline.due_ms, deadline.due_number = at_ms, self._num_set
        number = at_ms >> _SHARD_BITS
        shard = self._shards.get(number)
        if shard is None:
            shard = self._shards[number] = Shard()
            self._numbers.set(number, number)
        shard.add(deadline)

    def discard(self, deadline: Deadline) -> None:
        """It no longer matters."""
        if not isinstance(deadline, RequestRecord):
            self._others.discard(deadline)
        elif deadline.due_number:
            number = deadline.due_ms >> _SHARD_BITS
            shard = self._shards[number]
            shard.remove(deadline)
            if not shard.records:
                del self._shards[number]
                self._numbers.discard(number)

    def at_ms(self, deadline: Deadline) -> int | None:
        """When it falls due, None if it is not set."""
        if isinstance(deadline, RequestRecord):
            return deadline.due_ms if deadline.due_number else None
        key = self._others.key(deadline)
        return None if key is None else key[0]

    def pop_due(self, now_ms: int) -> Deadline | None:
        """The next deadline that has come, removed."""
        first = self._first()
        if first is None or first[0] > now_ms:
            return None
        self.discard(first[1])
        return first[1]

    def next_ms(self) -> int | None:
        """When to look again; may lie in the past."""
        first = self._first()
        return None if first is None else first[0]

    def __iter__(self) -> Iterator[Deadline]:
        yield from self._others
        for shard in self._shards.values():
            yield from shard.records

    def _first(self) -> tuple[int, Deadline] | None:
        """(when, what) of the first one."""
        other, number = self._others.peek(), self._numbers.peek()
        if number is not None:
            record = self._shards[number[1]].first()
            if other is None or (record.due_ms, record.due_number) < other[0]:
                return record.due_ms, record
        return None if other is None else (other[0][0], other[1])
