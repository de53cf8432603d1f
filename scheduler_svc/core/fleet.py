"""All executors, and the indexes that find one without looking at all of them.

Rule: an executor stands on the shelf of a model if the model is resident there and it has a slot
that the model may take. A shelf has one row for each size (num_slots), sorted by used slots, so
the first of a row has the most free slots and a pick looks at one executor for each size, however
many there are. Equal loads are taken in turn: the executor that the model used longest ago first.

Homes of a model: executors that serve, have it resident, and drain for nobody else; what it could
be granted on, full or not. Groups: executors that offer the same models, and which of them are
roomy, that is could begin to load one now.

``put`` follows every change of slots. ``leave`` and ``enter`` go around every change of what it
has: models, a reservation, whether it serves. ``part`` and ``join`` go around a change of what it
offers. Pools and offers are computed when asked for and forgotten when they may have changed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from scheduler_svc.core.domain import ExecutorRecord, Reservation, Why
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

    # warmth of those that share a home with it, itself first; if it has none, itself alone
    warmth: dict[str, float]
    # of its homes; if it has none, of the executors that could load it
    num_slots: int
    # of the largest of these
    num_largest: int


class Fleet:
    """All executors that are attached or inside their grace."""

    def __init__(self, wanted: Mapping[str, int]) -> None:
        # models that requests wait for; the queue's own book
        self._wanted = wanted
        self.executors: dict[str, ExecutorRecord] = {}
        # owner model -> reservation; the same objects as in ExecutorRecord.reservation
        self.reservations: dict[str, Reservation] = {}
        # model -> executors by id; no empty ones
        self.homes: dict[str, dict[str, ExecutorRecord]] = {}
        # model -> executors on which it is loading, by id; no empty ones
        self.loading: dict[str, dict[str, ExecutorRecord]] = {}
        # counts up with everything but slots
        self.version = 0
        self._groups: dict[frozenset[str], Group] = {}
        self._shelves: dict[str, Shelf] = {}
        self._pools: dict[str, Pool] = {}
        self._offers: dict[str, Offer] = {}
        self._num_turns = 0

    # --- the index ----------------------------------------------------------------------

    def put(self, executor: ExecutorRecord) -> None:
        """Bring the index up to date after slots changed."""
        num_free = executor.num_free if executor.is_serving else 0
        reservation = executor.reservation
        for model, residence in executor.residences.items():
            num_kept = (
                0 if reservation is None or reservation.model == model else reservation.num_kept
            )
            shelf = self._shelves.get(model)
            if num_free > num_kept:
                if shelf is None:
                    shelf = self._shelves[model] = Shelf()
                shelf.put(executor, executor.num_used + num_kept, residence.turn)
            elif shelf is not None:
                shelf.take(executor.executor_id)
        self._put_in_group(executor)

    def _put_in_group(self, executor: ExecutorRecord) -> None:
        group, executor_id = self._groups[executor.offered_models], executor.executor_id
        if executor.is_roomy:
            group.roomy[executor_id] = executor
            if self.is_open(executor):
                group.open[executor_id] = executor
                return
        else:
            group.roomy.pop(executor_id, None)
        group.open.pop(executor_id, None)

    def is_open(self, executor: ExecutorRecord) -> bool:
        """Whether a roomy executor has free memory, or something that nobody waits for."""
        if len(executor.residences) < executor.max_models:
            return True
        active, wanted = executor.active, self._wanted
        return any(model not in active and model not in wanted for model in executor.residences)

    def close(self, executor: ExecutorRecord) -> None:
        """It was found to be open no longer."""
        self._groups[executor.offered_models].open.pop(executor.executor_id, None)

    def unwanted(self, model: str) -> list[ExecutorRecord]:
        """Nobody waits for the model any more: the roomy homes of it, now open."""
        homes = [home for home in self.homes.get(model, {}).values() if home.is_roomy]
        for executor in homes:
            self._put_in_group(executor)
        return homes

    def leave(self, executor: ExecutorRecord) -> None:
        """Take an executor out of the index."""
        self._pools.clear()
        self.version += 1
        executor_id = executor.executor_id
        for model in executor.residences:
            shelf = self._shelves.get(model)
            if shelf is not None:
                shelf.take(executor_id)
                if not shelf.rows:
                    del self._shelves[model]
            _discard(self.homes, model, executor_id)
        if executor.loading is not None:
            _discard(self.loading, executor.loading.model, executor_id)
        group = self._groups[executor.offered_models]
        group.roomy.pop(executor_id, None)
        group.open.pop(executor_id, None)

    def enter(self, executor: ExecutorRecord) -> None:
        """Put an executor into the index."""
        self._pools.clear()
        self.version += 1
        executor_id = executor.executor_id
        if executor.is_serving:
            for model in executor.residences:
                if executor.num_kept_from(model) < executor.num_slots:
                    self.homes.setdefault(model, {})[executor_id] = executor
        if executor.loading is not None and executor.is_serving:
            self.loading.setdefault(executor.loading.model, {})[executor_id] = executor
        self.put(executor)

    def part(self, executor: ExecutorRecord) -> None:
        """Take it out of everything, before what it offers changes or it is forgotten."""
        self.leave(executor)
        self.offers_changed()
        group = self._groups[executor.offered_models]
        del group.members[executor.executor_id]
        if not group.members:
            del self._groups[executor.offered_models]

    def join(self, executor: ExecutorRecord) -> None:
        """Put it, new or changed, into everything."""
        self.offers_changed()
        group = self._groups.get(executor.offered_models)
        if group is None:
            group = self._groups[executor.offered_models] = Group(executor.offered_models)
        group.members[executor.executor_id] = executor
        self.enter(executor)

    def offers_changed(self) -> None:
        """Somebody came, went, began or ceased to drain, or learned how long loads take."""
        self._offers.clear()

    def had_turn(self, model: str, executor: ExecutorRecord, now_ms: int) -> None:
        """A grant of this model was made there; ``put`` follows."""
        self._num_turns += 1
        residence = executor.residences[model]
        residence.turn = self._num_turns
        residence.last_grant_ms = residence.last_used_ms = now_ms

    # --- questions ----------------------------------------------------------------------

    def rows(self, model: str) -> Iterator[LazyHeap[RowKey, str]]:
        """The usable executors of a model, by size."""
        shelf = self._shelves.get(model)
        return iter(shelf.rows.values() if shelf is not None else ())

    def warmth(self, model: str) -> float:
        """1 if the model has a home, 1/2 if it is on its way to one, else 0."""
        return 1.0 if model in self.homes else 0.5 if model in self.loading else 0.0

    def offer(self, model: str) -> Offer:
        """Who could serve a model; asked for known models only, so that the cache is bounded."""
        offer = self._offers.get(model)
        if offer is None:
            groups = tuple(group for group in self._groups.values() if model in group.models)
            members = [executor for group in groups for executor in group.members.values()]
            load_ms = [executor.load_ms[model] for executor in members if model in executor.load_ms]
            offer = self._offers[model] = Offer(
                groups,
                any(not executor.is_draining for executor in members),
                min(load_ms, default=None),
            )
        return offer

    def pool(self, model: str) -> Pool:
        """What a model shares; asked for known models only, so that the cache is bounded."""
        pool = self._pools.get(model)
        if pool is None:
            groups = self.offer(model).groups
            reach: Iterable[ExecutorRecord] = (
                self.homes[model].values()
                if model in self.homes
                else (executor for group in groups for executor in group.members.values())
            )
            warmth, num_slots, num_largest = {model: self.warmth(model)}, 0, 0
            for executor in reach:
                if executor.is_serving:
                    num_slots += executor.num_slots
                    num_largest = max(num_largest, executor.num_slots)
                    if model in self.homes:
                        for other in executor.residences:
                            if other not in warmth:
                                warmth[other] = self.warmth(other)
            pool = self._pools[model] = Pool(warmth, num_slots, num_largest)
        return pool

    def has_open(self, model: str) -> bool:
        """Some executor that offers the model could load it at nobody's cost."""
        return any(group.open for group in self.offer(model).groups)

    def has_usable(self, model: str) -> bool:
        """Some executor has the model and a slot for it."""
        shelf = self._shelves.get(model)
        return shelf is not None and bool(shelf.rows)

    def has_other_home(self, model: str, executor: ExecutorRecord) -> bool:
        """Whether an executor but this one serves, offers the model, and drains for no other."""
        for group in self.offer(model).groups:
            for other in group.members.values():
                reservation = other.reservation
                is_drained = (
                    reservation is not None
                    and reservation.model != model
                    and reservation.why in (Why.DRAIN, Why.TIME_SLICE)
                )
                if other is not executor and other.is_serving and not is_drained:
                    return True
        return False


def _discard(index: dict[str, dict[str, ExecutorRecord]], model: str, executor_id: str) -> None:
    members = index.get(model)
    if members is not None:
        members.pop(executor_id, None)
        if not members:
            del index[model]
