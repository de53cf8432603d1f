"""Which models are where: the core orders every load, and what has to leave for it.

Rule: an executor has at most max_models models, resident or loading, and loads one at a time.
Nothing is granted for a model until its executor said that it is resident. Nothing leaves while
a lease of it is there. What a load that fails leads to is in failing.py; one that is not answered
in load_timeout_ms failed, and its session is cut. A load goes on while a session is broken: the
executor says so when it attaches, and the time for an answer begins anew.

Where: an executor with a free slot; memory that is free before a model that nobody needs, and that
before a forced switch; then the shortest load, the least used, and of models to drop the one
longest unused. A switch is forced if it drops a model that is held or wanted:
- held: idle for less than model_hold_ms, kept for follow-ups;
- wanted: requests for it wait.
A head may force one (so the hold is waived on that one executor, by a load that really begins) if
nobody waits who could run on what it drops. Else only the first place of a model may, and only
within the switch budget: after a forced switch that took load_ms none is begun there for load_ms
/ switch_time_share, by these or by drains. Without it an executor that is idle at each end, with
one slot or wide requests, would spend its time on loads for whoever waits a little longer.

Who is tried first is a matter of claims (priority.py), asked anew after each load.

A second place is worth a load only if those who wait for the model would wait longer for the
places that it has or gets than the load takes; what was never measured is given the benefit.
"""

from typing import NamedTuple

from scheduler_svc.core import bands, drain, explain, failing
from scheduler_svc.core.deadlines import LoadDue
from scheduler_svc.core.domain import (
    ExecutorRecord,
    Load,
    RequestRecord,
    Reservation,
    Residence,
    Why,
)
from scheduler_svc.core.messages import ModelChanged, ModelLoadOrdered, ModelState
from scheduler_svc.core.placement import is_claimed
from scheduler_svc.core.state import State

# (kind, is claimed, load_ms, used share, last used, number)
_Key = tuple[int, bool, int, float, int, int]


class Target(NamedTuple):
    """An executor that could load a model now."""

    executor: ExecutorRecord
    evict: tuple[str, ...]
    is_forced: bool


class Search:
    """A look for a target, and when looking again may find one that time alone makes."""

    def __init__(self, state: State, head: RequestRecord, is_first: bool) -> None:
        self._state = state
        self._head = head
        self._is_first = is_first
        self.retry_ms: int | None = None
        # all that there were, for the decision log only
        self.targets: list[Target] | None = [] if state.settings.has_decision_log else None

    def run(self) -> Target | None:
        """The best target, None if there is none now."""
        best: Target | None = None
        best_key: _Key | None = None
        model = self._head.request.model
        for executor in self._state.fleet.roomy(model, is_open=not self._is_first):
            target = self._option(executor)
            if target is None:
                continue
            if self.targets is not None:
                self.targets.append(target)
            key = self._key(target)
            if best_key is None or key < best_key:
                best, best_key = target, key
        return best

    def _option(self, executor: ExecutorRecord) -> Target | None:
        model, now_ms = self._head.request.model, self._state.now_ms
        reservation = executor.reservation
        is_ours = reservation is not None and reservation.model == model
        if model in executor.residences or not (is_ours or self._may_take(executor, reservation)):
            return None
        retry_ms = failing.retry_ms(self._state, executor, model)
        if retry_ms > now_ms:
            self._again(retry_ms)
            return None
        num_evicted = executor.num_to_leave
        if num_evicted <= 0:
            return Target(executor, (), False)
        idle = sorted(
            (self._is_held(executor, other) or self._is_wanted(other), home.last_used_ms, other)
            for other, home in executor.residences.items()
            if other not in executor.active
        )
        if len(idle) < num_evicted:
            return None
        evict = idle[:num_evicted]
        is_forced = any(is_needed for is_needed, _, _ in evict)
        names = tuple(name for _, _, name in evict)
        if is_forced and not is_ours and not self._may_force(executor, names):
            return None
        return Target(executor, names, is_forced)

    def _may_take(self, executor: ExecutorRecord, reservation: Reservation | None) -> bool:
        """Whether nobody else's reservation is in the way. The first place of a model takes over a
        claim of who ranks after its head: claims follow one another, and it would wait for all."""
        if reservation is None:
            return True
        if reservation.why is not Why.WIDE or not self._is_first:
            return False
        if is_claimed(executor, self._head, self._state.waking.rank(self._head)):
            self._again(self._state.now_ms + drain.CLAIM_RETRY_MS)
            return False
        return True

    def _may_force(self, executor: ExecutorRecord, names: tuple[str, ...]) -> bool:
        state = self._state
        if not state.settings.is_fifo and not any(map(self._is_served, names)):
            return True  # nothing runs there, and nobody who waits could
        if not self._is_first or state.settings.is_fifo:
            if any(map(self._is_wanted, names)):
                state.fleet.close(executor)
            for name in names:
                self._again(executor.residences[name].held_until_ms)
            return False
        if state.now_ms < executor.next_switch_ms:
            self._again(executor.next_switch_ms)
            for name in names:
                self._again(executor.residences[name].held_until_ms)
            return False
        return True

    def _is_served(self, model: str) -> bool:
        """Whether somebody waits for a model that is there, and could have its slots."""
        return self._is_wanted(model) and not self._state.is_at_limit(model)

    def _key(self, target: Target) -> _Key:
        executor, model = target.executor, self._head.request.model
        reservation = executor.reservation
        kind = 2 if target.is_forced else 1 if target.evict else 0
        if reservation is not None and reservation.model == model:
            kind = -1  # drained for this model: that is what it was for
        return (
            kind,
            reservation is not None,
            executor.load_ms.get(model, 0),
            executor.num_used / executor.num_slots,
            max((executor.residences[name].last_used_ms for name in target.evict), default=0),
            executor.number,
        )

    def _is_held(self, executor: ExecutorRecord, model: str) -> bool:
        return executor.residences[model].held_until_ms > self._state.now_ms

    def _is_wanted(self, model: str) -> bool:
        return model in self._state.queue.num_by_model

    def _again(self, at_ms: int) -> None:
        if at_ms > self._state.now_ms and (self.retry_ms is None or at_ms < self.retry_ms):
            self.retry_ms = at_ms


def is_worth_another(state: State, model: str) -> bool:
    """Whether a model that has a place, or gets one, should have one more."""
    fleet = state.fleet
    num_coming = sum(executor.num_slots for executor in fleet.loading.get(model, {}).values())
    num_left = state.queue.num_by_model[model] - num_coming
    if num_left <= 0:
        return False
    load_ms = fleet.offer(model).load_ms
    wait_ms = state.estimator.drain_ms(model, num_left)
    return load_ms is None or wait_ms is None or wait_ms >= load_ms


def order(
    state: State,
    head: RequestRecord,
    target: Target,
    is_first: bool,
    targets: list[Target] | None = None,
) -> None:
    """Begin a load; ``targets``: all that could be chosen, for the decision log."""
    executor, evict, is_forced = target
    model = head.request.model
    assert executor.session is not None
    assert executor.loading is None
    assert not any(name in executor.active for name in evict)
    own = state.fleet.reservations.get(model)
    if own is not None:
        is_forced = is_forced or own is executor.reservation
        state.end_reservation(model, "load begins")
    drain.displace(state, executor)
    load_ms = executor.load_ms.get(model)
    due_ms = _begin(state, executor, Load(model, state.now_ms, load_ms, is_forced), evict)
    if evict:
        state.prefixes.drop_executor(executor.executor_id)
    state.count("load.forced" if is_forced else "load")
    state.send(ModelLoadOrdered(executor.executor_id, executor.session, model, evict))
    if is_first and not state.settings.is_fifo:
        num_kept = min(head.request.num_samples, executor.num_slots)
        deadline_ms = due_ms + state.settings.load_timeout_ms
        expected_ms = state.now_ms + (load_ms or 0)
        state.reserve(executor, head, Why.LOAD, deadline_ms, num_kept, expected_ms)
    if targets is not None:
        kind = "forced switch" if is_forced else "first place" if is_first else "one more place"
        others = [(one.evict, one.executor) for one in targets if one.executor is not executor]
        state.decide("load", head, explain.load(state, model, kind, [(evict, executor), *others]))


def goes_on(state: State, executor: ExecutorRecord, model: str) -> None:
    """A load that an earlier session ordered is under way still."""
    load_ms = executor.load_ms.get(model)
    _begin(state, executor, Load(model, state.now_ms, load_ms, is_forced=False), ())
    state.count("load.goes_on")


def _begin(state: State, executor: ExecutorRecord, load: Load, evict: tuple[str, ...]) -> int:
    """Enter a load; gives when it must be answered."""
    assert executor.loading is None
    state.fleet.leave(executor)
    for name in evict:
        del executor.residences[name]
    executor.loading = load
    state.estimator.placed(load.model)
    state.fleet.enter(executor)
    due_ms = state.now_ms + state.settings.load_timeout_ms
    state.deadlines.set(LoadDue(executor.executor_id), due_ms)
    return due_ms


def changed(state: State, executor: ExecutorRecord, event: ModelChanged) -> None:
    """An executor said what became of a model."""
    if event.model not in executor.offered_models:
        state.count("ignored.unknown_model")
        return
    load = executor.loading
    is_ordered = load is not None and load.model == event.model
    if event.state is ModelState.RESIDENT:
        _came(state, executor, event)
    elif is_ordered:
        failed(state, executor, event.message)
        return
    else:
        claim = executor.reservation
        if claim is not None and claim.why is Why.WIDE and claim.model == event.model:
            state.end_reservation(event.model, "model left")
        state.fleet.leave(executor)
        executor.residences.pop(event.model, None)
        state.fleet.enter(executor)
        state.prefixes.drop_executor(executor.executor_id)
    state.executor_changed(executor)


def failed(state: State, executor: ExecutorRecord, message: str) -> None:
    """The load that was ordered did not work."""
    load = executor.loading
    assert load is not None
    failing.failed(state, executor, load.model, message)
    state.count("load.failed")
    stop_loading(state, executor)
    state.executor_changed(executor)
    failing.review(state, load.model)


def stop_loading(state: State, executor: ExecutorRecord) -> None:
    """No load is under way any more."""
    load = executor.loading
    if load is None:
        return
    reservation = executor.reservation
    if reservation is not None and reservation.why is Why.LOAD:
        state.end_reservation(reservation.model, "load ended")
    state.deadlines.discard(LoadDue(executor.executor_id))
    if load.is_forced:
        _dwell(state, executor, load.load_ms or 0)
    state.fleet.leave(executor)
    executor.loading = None
    state.fleet.enter(executor)
    state.waking.wake(load.model)


def _came(state: State, executor: ExecutorRecord, event: ModelChanged) -> None:
    load, model = executor.loading, event.model
    if load is not None and load.model == model:
        load_ms = state.now_ms - load.since_ms if event.load_ms is None else event.load_ms
        state.fleet.load_took(model, executor, load_ms)
        if load.is_forced:
            _dwell(state, executor, load_ms)
        state.deadlines.discard(LoadDue(executor.executor_id))
    elif event.load_ms is not None:
        state.fleet.load_took(model, executor, event.load_ms)
    failing.worked(state, executor, model)
    state.fleet.leave(executor)
    if load is not None and load.model == model:
        executor.loading = None
    if model not in executor.residences:
        executor.residences[model] = Residence(last_used_ms=state.now_ms)
        bands.model_came(executor)
    state.fleet.enter(executor)
    state.owed_changed(executor)
    state.count("load.done")
    head = state.queue.head(model)
    if head is not None and state.settings.has_decision_log:
        state.decide("resident", head, f"on {executor.executor_id}")


def _dwell(state: State, executor: ExecutorRecord, load_ms: int) -> None:
    """A forced switch is over; what an earlier one forbids for longer stays forbidden."""
    next_ms = state.now_ms + round(load_ms / state.settings.switch_time_share)
    executor.next_switch_ms = max(executor.next_switch_ms, next_ms)
