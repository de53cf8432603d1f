"""What the fleet's index is made of: shelves of usable executors, groups, and two answers.

Rule: a shelf has one row for each size (num_slots), sorted by used slots, so the first of a row has
the most free slots and a pick looks at one executor for each size, however many there are. Equal
loads are taken in turn: the executor that the model used longest ago first.
"""

from dataclasses import dataclass, field

from scheduler_svc.core.domain import ExecutorRecord
from scheduler_svc.core.lazy_heap import LazyHeap

# (used slots, turn, executor number)
RowKey = tuple[int, int, int]


class Shelf:
    """The usable executors of one model."""

    __slots__ = ("_row_of", "rows")

    def __init__(self) -> None:
        # num_slots -> executors by (used, turn, number); no empty rows
        self.rows: dict[int, LazyHeap[RowKey, str]] = {}
        # executor_id -> the row that it is in
        self._row_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    def put(self, executor: ExecutorRecord, num_used: int, turn: int) -> None:
        """Enter an executor or bring its entry up to date."""
        executor_id, num_slots = executor.executor_id, executor.num_slots
        if self._row_of.get(executor_id, num_slots) != num_slots:
            self.take(executor_id)
        self._row_of[executor_id] = num_slots
        row = self.rows.get(num_slots)
        if row is None:
            row = self.rows[num_slots] = LazyHeap()
        row.set(executor_id, (num_used, turn, executor.number))

    def take(self, executor_id: str) -> None:
        """It is not usable for now."""
        num_slots = self._row_of.pop(executor_id, None)
        if num_slots is None:
            return
        self.rows[num_slots].discard(executor_id)
        if not len(self.rows[num_slots]):
            del self.rows[num_slots]


@dataclass(slots=True)
class Group:
    """Executors that offer the same models."""

    models: frozenset[str]
    # by executor_id, lost and draining ones too
    members: dict[str, ExecutorRecord] = field(default_factory=dict)
    # could begin to load a model, if need be in place of one that is held or wanted
    roomy: dict[str, ExecutorRecord] = field(default_factory=dict)
    # of the roomy: could do so without, at least when they were put here
    open: dict[str, ExecutorRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Offer:
    """Who could serve a model."""

    groups: tuple[Group, ...]
    # somebody does not drain, and is attached or expected back
    is_there: bool
    # the shortest known time to load it anywhere
    load_ms: int | None


@dataclass(frozen=True, slots=True)
class Pool:
    """What a model shares with others at the moment."""

    # warmth of those that share a home with it, itself first
    warmth: dict[str, float]
    # of its homes; if it has none, of the executors that could load it
    num_slots: int
    # of the largest of these
    num_largest: int
