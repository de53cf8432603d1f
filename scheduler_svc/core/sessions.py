"""Executors: attach, change, drain, get lost, come back or not.

Rule: a session is one stream; an executor has one at most, and whoever attaches last has it. A
lost executor's leases are in doubt for executor_grace_ms, their slots with them. Back in time as
the same process (incarnation), what it still holds goes on (leases.py). Grace over, or back as a
new process: all of it goes back to the head of its flow at once, and each such loss counts as a
crash of its request; max_attempts of those end it. A record is forgotten with its grace.

Draining ends with an undrain or a new process, not with a new session. An executor that was lost
for good while it loaded a model counts against that model (failing.py), unless it was on its way
out anyhow.
"""

from headway.reasons import Reason
from scheduler_svc.core import drain, failing, leases, lifecycle, residency
from scheduler_svc.core.deadlines import GraceDue, RevokeDue
from scheduler_svc.core.domain import ExecutorRecord, LeaseState, Residence
from scheduler_svc.core.messages import (
    ExecutorAttached,
    ExecutorCapacityChanged,
    ExecutorDrained,
    ExecutorWelcomed,
    SessionClosed,
)
from scheduler_svc.core.state import State


def current(state: State, executor_id: str, session: int) -> ExecutorRecord | None:
    """The executor if this is its current session; everything else is dropped."""
    executor = state.fleet.executors.get(executor_id)
    if executor is not None and executor.session == session:
        return executor
    state.count("ignored.stale_session")
    return None


def attach(state: State, event: ExecutorAttached) -> None:
    """Open a session and decide on what was held before."""
    executor = state.fleet.executors.get(event.executor_id)
    is_new = executor is None
    if executor is None:
        if len(state.fleet.executors) >= state.settings.max_executors:
            state.count("session_closed.fleet_full")
            state.send(SessionClosed(event.executor_id, event.session, "The fleet is full."))
            return
        executor = state.new_executor(event.executor_id, event.incarnation)
    elif executor.session == event.session:
        state.count("ignored.stale_session")
        return
    elif executor.session is not None:
        state.count("session_closed.replaced")
        close(state, executor, "A newer session replaced this one.")
    if executor.incarnation != event.incarnation:
        send_back(state, executor, "executor_restarted")
        state.prefixes.drop_executor(executor.executor_id)
        executor.is_draining = False
        executor.failures.clear()
        failing.lost_for_good(state, executor)
    failing.came_back(state, executor)
    if not is_new:
        state.fleet.part(executor)
    _update(executor, event)
    state.fleet.join(executor)
    for offer in event.models:
        if offer.is_loading:
            residency.goes_on(state, executor, offer.model)
    state.know_models(executor)
    state.deadlines.discard(GraceDue(executor.executor_id))
    state.count("attached")
    state.send(ExecutorWelcomed(executor.executor_id, event.session))
    leases.reconcile(state, executor, event.held)
    state.executor_changed(executor)
    failing.review_offers(state, executor)
    tell_drained(state, executor)


def change_capacity(state: State, executor: ExecutorRecord, event: ExecutorCapacityChanged) -> None:
    """What runs goes on; new work sees the new number."""
    state.fleet.leave(executor)
    executor.num_slots = event.num_slots
    executor.max_models = event.max_models
    state.fleet.enter(executor)
    state.executor_changed(executor)
    drain.review(state)


def set_draining(state: State, executor_id: str, is_draining: bool) -> None:
    """Take an executor out of service or back; unknown ones are left alone."""
    executor = state.fleet.executors.get(executor_id)
    if executor is None or executor.is_draining == is_draining:
        return
    state.fleet.leave(executor)
    executor.is_draining = is_draining
    executor.drained_session = None
    state.fleet.enter(executor)
    state.fleet.offers_changed()
    state.executor_changed(executor)
    drain.review(state)
    failing.review_offers(state, executor)
    tell_drained(state, executor)


def tell_drained(state: State, executor: ExecutorRecord) -> None:
    """Once in a session, when a draining executor holds nothing."""
    session = executor.session
    if not executor.is_draining or executor.leases or session in (None, executor.drained_session):
        return
    executor.drained_session = session
    state.count("drained")
    state.send(ExecutorDrained(executor.executor_id, session))


def close(state: State, executor: ExecutorRecord, message: str) -> None:
    """Cut an executor's session; it may attach again within its grace."""
    assert executor.session is not None
    state.send(SessionClosed(executor.executor_id, executor.session, message))
    lose(state, executor)


def lose(state: State, executor: ExecutorRecord) -> None:
    """A session is over: everything that the executor has is in doubt."""
    failing.lost(state, executor)
    residency.stop_loading(state, executor)
    state.fleet.leave(executor)
    executor.session = None
    for lease in list(executor.leases.values()):
        state.deadlines.discard(RevokeDue(executor.executor_id, lease.key))
        executor.move(lease, LeaseState.IN_DOUBT)
    state.fleet.enter(executor)
    state.executor_changed(executor)
    drain.review(state)
    due = GraceDue(executor.executor_id)
    state.deadlines.set(due, state.now_ms + state.settings.executor_grace_ms)


def forget(state: State, executor: ExecutorRecord) -> None:
    """A lost executor's grace is over."""
    state.count("executor_lost")
    send_back(state, executor, "executor_lost")
    state.fleet.part(executor)
    del state.fleet.executors[executor.executor_id]
    state.prefixes.drop_executor(executor.executor_id)
    state.sessions.drop_executor(executor.executor_id)
    failing.lost_for_good(state, executor)
    failing.review_offers(state, executor)


def send_back(state: State, executor: ExecutorRecord, why: str) -> None:
    """An executor died with all that it had."""
    for lease in list(executor.leases.values()):
        record = state.owner(lease)
        leases.close(state, executor, lease)
        if record is None:
            continue
        record.num_crashes += 1
        if record.num_crashes >= state.settings.max_attempts:
            lifecycle.finish(
                state, record, Reason.ATTEMPTS_EXHAUSTED, "Every executor that tried it was lost."
            )
        else:
            lifecycle.requeue(state, record, why)


def _update(executor: ExecutorRecord, event: ExecutorAttached) -> None:
    executor.session = event.session
    executor.incarnation = event.incarnation
    executor.num_slots = event.num_slots
    executor.max_models = event.max_models
    executor.offered_models = frozenset(offer.model for offer in event.models)
    for offer in event.models:
        if offer.load_ms is not None:
            executor.load_ms[offer.model] = offer.load_ms
    executor.load_ms = {
        model: load_ms
        for model, load_ms in executor.load_ms.items()
        if model in executor.offered_models
    }
    executor.failures = {
        model: failures
        for model, failures in executor.failures.items()
        if model in executor.offered_models
    }
    executor.residences = {
        offer.model: executor.residences.get(offer.model, Residence())
        for offer in event.models
        if offer.is_resident
    }
