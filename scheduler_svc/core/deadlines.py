"""Everything that happens by time alone, in one heap.

Rule: a deadline is named by what it ends; setting it again moves it. It falls due when its
millisecond has come, in order of time and then of setting. Nothing looks at the clock anywhere
else: without Tick nothing expires, except that placement never grants an overdue request.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from scheduler_svc.core.domain import LeaseKey
from scheduler_svc.core.lazy_heap import LazyHeap


@dataclass(frozen=True, slots=True)
class RequestDue:
    """The clock of a request (queueing or executing) ran out."""

    request_id: str


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


Deadline = RequestDue | RevokeDue | GraceDue | LoadDue | ReservationDue | ModelDue


class Deadlines:
    """What falls due when."""

    def __init__(self) -> None:
        self._heap: LazyHeap[tuple[int, int], Deadline] = LazyHeap()
        self._num_set = 0

    def set(self, deadline: Deadline, at_ms: int) -> None:
        """Add or move a deadline."""
        self._num_set += 1
        self._heap.set(deadline, (at_ms, self._num_set))

    def discard(self, deadline: Deadline) -> None:
        """It no longer matters."""
        self._heap.discard(deadline)

    def at_ms(self, deadline: Deadline) -> int | None:
        """When it falls due, None if it is not set."""
        key = self._heap.key(deadline)
        return None if key is None else key[0]

    def pop_due(self, now_ms: int) -> Deadline | None:
        """The next deadline that has come, removed."""
        first = self._heap.peek()
        if first is None or first[0][0] > now_ms:
            return None
        self._heap.discard(first[1])
        return first[1]

    def next_ms(self) -> int | None:
        """When to look again; may lie in the past."""
        first = self._heap.peek()
        return None if first is None else first[0][0]

    def __iter__(self) -> Iterator[Deadline]:
        return iter(self._heap)
