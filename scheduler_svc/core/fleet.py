"""All executors, and the indexes that find one without looking at all of them.

Rule: an executor stands on the shelf of a model if the model is resident there and it has a slot
that the model may take (shelves.py).

Homes of a model: executors that serve, have it resident, and drain for nobody else; what it could
be granted on, full or not. Groups: executors that offer the same models, and which of them are
roomy, that is could begin to load one now.

``put`` follows every change of slots. ``leave`` and ``enter`` go around every change of what it
has: models, a reservation, whether it serves. ``part`` and ``join`` go around a change of what it
offers. Pools and offers are computed when asked for and forgotten when they may have changed.

Shelves and roomy members are brought up to date when somebody asks for them (``refresh``): under
load a slot is given back and granted again between two questions, and the index never hears of it.
"""

from collections.abc import Iterable, Iterator, Mapping

from scheduler_svc.core.domain import ExecutorRecord, Reservation, Why
from scheduler_svc.core.lazy_heap import LazyHeap
from scheduler_svc.core.shelves import Group, Offer, Pool, RowKey, Shelf


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
        # models that got a first home or lost the last one; cleared by whoever reads it
        self.moved: set[str] = set()
        # model -> executors on which it is loading, by id; no empty ones
        self.loading: dict[str, dict[str, ExecutorRecord]] = {}
        # counts up with everything but slots
        self.version = 0
        self._groups: dict[frozenset[str], Group] = {}
        self._shelves: dict[str, Shelf] = {}
        self._pools: dict[str, Pool] = {}
        self._offers: dict[str, Offer] = {}
        self._num_turns = 0
        # executors whose slots changed since the index was brought up to date
        self._stale: dict[str, ExecutorRecord] = {}
        # executors that the index has on shelves or in groups' roomy
        self._listed: set[str] = set()
        # resident model -> roomy executors by id; no empty ones
        self._roomy_with: dict[str, dict[str, ExecutorRecord]] = {}
        # models that nobody waits for since the index was brought up to date
        self._unwanted: dict[str, None] = {}
        # groups with an open executor
        self._num_open_groups = 0

    # --- the index ----------------------------------------------------------------------

    def put(self, executor: ExecutorRecord) -> None:
        """Slots changed."""
        self._stale[executor.executor_id] = executor

    def refresh(self) -> None:
        """Bring the index up to date; what was full and is full again costs nothing."""
        if self._stale:
            self._refresh_slots()
        if self._unwanted:
            unwanted, self._unwanted = self._unwanted, {}
            for model in unwanted:
                if model not in self._wanted:
                    for executor in self._roomy_with.get(model, {}).values():
                        self._put_in_group(executor)

    def _refresh_slots(self) -> None:
        stale, self._stale = self._stale, {}
        for executor_id, executor in stale.items():
            if executor.num_used < executor.num_slots or executor_id in self._listed:
                self._list(executor)

    def _list(self, executor: ExecutorRecord) -> None:
        num_free = executor.num_free if executor.is_serving else 0
        if num_free:
            self._listed.add(executor.executor_id)
        else:
            self._listed.discard(executor.executor_id)
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
                self._unshelve(model, shelf, executor.executor_id)
        self._put_in_group(executor)

    def _unshelve(self, model: str, shelf: Shelf, executor_id: str) -> None:
        shelf.take(executor_id)
        if not shelf.rows:
            del self._shelves[model]

    def _put_in_group(self, executor: ExecutorRecord) -> None:
        group, executor_id = self._groups[executor.offered_models], executor.executor_id
        if executor.is_roomy:
            group.roomy[executor_id] = executor
            for model in executor.residences:
                self._roomy_with.setdefault(model, {})[executor_id] = executor
            if self.is_open(executor):
                self._num_open_groups += not group.open
                group.open[executor_id] = executor
                return
        else:
            self._not_roomy(group, executor)
        self._close(group, executor_id)

    def _not_roomy(self, group: Group, executor: ExecutorRecord) -> None:
        if group.roomy.pop(executor.executor_id, None) is not None:
            for model in executor.residences:
                _discard(self._roomy_with, model, executor.executor_id)

    def _close(self, group: Group, executor_id: str) -> None:
        if group.open.pop(executor_id, None) is not None:
            self._num_open_groups -= not group.open

    def is_open(self, executor: ExecutorRecord) -> bool:
        """Whether a roomy executor has free memory, or enough that nobody waits for."""
        num_to_leave = executor.num_to_leave
        if num_to_leave <= 0:
            return True
        active, wanted, residences = executor.active, self._wanted, executor.residences
        num_idle = sum(model not in active and model not in wanted for model in residences)
        return num_idle >= num_to_leave

    def close(self, executor: ExecutorRecord) -> None:
        """It was found to be open no longer."""
        self._close(self._groups[executor.offered_models], executor.executor_id)

    def unwanted(self, model: str) -> None:
        """Nobody waits for the model any more: roomy executors that have it may be open now."""
        self._unwanted[model] = None

    def leave(self, executor: ExecutorRecord) -> None:
        """Take an executor out of the index."""
        self._pools.clear()
        self.version += 1
        executor_id = executor.executor_id
        self._stale.pop(executor_id, None)
        self._listed.discard(executor_id)
        for model in executor.residences:
            shelf = self._shelves.get(model)
            if shelf is not None:
                self._unshelve(model, shelf, executor_id)
            _discard(self.homes, model, executor_id)
            if model not in self.homes:
                self.moved.add(model)
        if executor.loading is not None:
            _discard(self.loading, executor.loading.model, executor_id)
        group = self._groups[executor.offered_models]
        self._not_roomy(group, executor)
        self._close(group, executor_id)

    def enter(self, executor: ExecutorRecord) -> None:
        """Put an executor into the index."""
        self._pools.clear()
        self.version += 1
        executor_id = executor.executor_id
        if executor.is_serving:
            for model in executor.residences:
                if executor.num_kept_from(model) < executor.num_slots:
                    if model not in self.homes:
                        self.moved.add(model)
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
        """Somebody came, went, or began or ceased to drain."""
        self._offers.clear()

    def load_took(self, model: str, executor: ExecutorRecord, load_ms: int) -> None:
        """An executor learned how long loading the model there takes."""
        before = executor.load_ms.get(model)
        executor.load_ms[model] = load_ms
        offer = self._offers.get(model)
        if offer is None or load_ms == offer.load_ms:
            return
        if offer.load_ms is None or load_ms < offer.load_ms:
            self._offers[model] = Offer(offer.groups, offer.is_there, load_ms)
        elif before == offer.load_ms:  # it may have been the only one as quick
            del self._offers[model]

    def had_turn(self, model: str, executor: ExecutorRecord, now_ms: int) -> None:
        """A grant of this model was made there; ``put`` follows."""
        self._num_turns += 1
        residence = executor.residences[model]
        residence.turn = self._num_turns
        residence.last_grant_ms = residence.last_used_ms = now_ms

    # --- questions ----------------------------------------------------------------------

    def rows(self, model: str) -> Iterator[LazyHeap[RowKey, str]]:
        """The usable executors of a model, by size."""
        self.refresh()
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
        self.refresh()
        return self._has_open(model)

    def _has_open(self, model: str) -> bool:
        return self._num_open_groups > 0 and any(group.open for group in self.offer(model).groups)

    def has_usable(self, model: str) -> bool:
        """Some executor has the model and a slot for it."""
        self.refresh()
        return model in self._shelves

    def is_only_room(self, executor: ExecutorRecord) -> bool:
        """Whether those who wait for the models of an executor that was full until now, the last
        one that ``put`` was told of, have no other place and none can be made for nothing."""
        if len(self._stale) > 1 or executor.executor_id in self._listed:
            return False
        for model in executor.residences:
            if model in self._wanted and (model in self._shelves or self._has_open(model)):
                return False
        return True

    def has_choice(self, model: str) -> bool:
        """Several executors have the model and a slot for it."""
        self.refresh()
        shelf = self._shelves.get(model)
        return shelf is not None and len(shelf) > 1

    def roomy_with(self, model: str) -> list[ExecutorRecord]:
        """Executors that have the model and could begin to load another one."""
        self._refresh_slots()
        return [home for home in self._roomy_with.get(model, {}).values() if home.is_roomy]

    def roomy(self, model: str, *, is_open: bool) -> Iterator[ExecutorRecord]:
        """Executors that offer the model and could begin to load one, or do so at nobody's cost;
        ``close`` may be called meanwhile."""
        self.refresh()
        for group in self.offer(model).groups:
            yield from list((group.open if is_open else group.roomy).values())

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
