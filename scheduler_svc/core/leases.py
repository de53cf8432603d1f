"""Leases: who runs what, and what goes on after an executor was away.

Rule: (epoch, attempt) is the fence. A grant or an adoption gives a request its next attempt
number, and only the lease that the record points to speaks for the request. An end of any other
lease is acknowledged, so that the executor can forget it, and changes no request. Slots follow
the executor's word, not ours: a lease that we gave up (cancelled, timed out) keeps its slots until
the executor says that it ended; if it does not within revoke_timeout_ms its session is cut.

An executor that attaches names what it still holds (``reconcile``):
- held, and its request waits or is leased right here: goes on under a new attempt (adopted), also
  if an earlier scheduler granted it, or it went back to the queue meanwhile;
- never granted at all: left unanswered, which an executor takes for revoked (fleet.proto);
- held, and its request ended or is leased elsewhere: acknowledged if it has ended, else revoked,
  and in our books until that is confirmed, with what the executor says that it takes;
- in our books but not named: back to the head of its flow at once. That is no crash: the order to
  start or to go on was lost on the way. What an executor gives back is no crash either.
"""

from headway.reasons import Reason
from scheduler_svc.core import counts, lifecycle
from scheduler_svc.core.deadlines import RevokeDue
from scheduler_svc.core.domain import (
    ExecutorRecord,
    Lease,
    LeaseKey,
    LeaseState,
    RequestRecord,
    Why,
)
from scheduler_svc.core.messages import (
    HeldLease,
    LeaseAcknowledged,
    LeaseAdopted,
    LeaseEnded,
    LeaseGranted,
    LeaseOutcome,
    LeaseRevoked,
)
from scheduler_svc.core.state import State

_REQUEUED = {
    LeaseOutcome.RETURNED: "returned",
    LeaseOutcome.REVOKED: "revoked",
    LeaseOutcome.UNKNOWN: "unknown",
}


def grant(state: State, record: RequestRecord, executor: ExecutorRecord) -> None:
    """Give the head of a flow to an executor that has room; ``head_changed`` is left to the
    caller."""
    assert executor.session is not None
    num_slots = _num_slots(record, executor)
    assert num_slots <= executor.num_free
    request, model = record.request, record.request.model
    if executor.owed_band is not None or state.queue.has_several_bands():
        barred = state.at_limit(executor.residences) if state.settings.model_limits else ()
        state.waking.shares.granted(executor, request.band, state.queue.bands, barred)
    state.queue.take(record, state.now_ms)
    _open(state, record, executor, num_slots, state.now_ms)
    state.fleet.had_turn(model, executor, state.now_ms)
    reservation = executor.reservation
    if reservation is not None and reservation.why is Why.LOAD and reservation.model == model:
        state.end_reservation(model, "granted")
    state.owed_changed(executor)
    state.slots_changed(executor)
    state.prefixes.add(executor.executor_id, request.prefix_hashes)
    state.estimator.granted(record, state.now_ms)
    state.count("granted")
    state.send(
        LeaseGranted(executor.executor_id, executor.session, request.request_id, record.attempt)
    )


def revoke(state: State, executor: ExecutorRecord, lease: Lease) -> None:
    """Tell an executor to stop, and book what is in no book yet; a lost one is told if it comes
    back."""
    if executor.session is None:
        return
    if lease.key not in executor.leases:
        _count(state, lease, 1)
    executor.move(lease, LeaseState.REVOKING)
    due = RevokeDue(executor.executor_id, lease.key)
    state.deadlines.set(due, state.now_ms + state.settings.revoke_timeout_ms)
    state.count("revoked")
    state.send(LeaseRevoked(executor.executor_id, executor.session, *lease.key))


def revoke_current(state: State, record: RequestRecord) -> None:
    """Tell the executor of a request that just finished, if it had one."""
    if record.lease is not None:
        revoke(state, state.fleet.executors[record.lease.executor_id], record.lease)


def ended(state: State, executor: ExecutorRecord, event: LeaseEnded) -> None:
    """An executor's last word on a lease: slots back, then the request's fate if it is current."""
    key = (event.request_id, event.epoch, event.attempt)
    lease = executor.leases.get(key)
    if lease is None:
        state.count("ignored.stale_lease")
    else:
        record = state.owner(lease)
        if record is not None:
            state.estimator.ended(lease.model, lease, event.num_generated_tokens, state.now_ms)
        state.fleet.refresh()
        _give_back(state, executor, lease)
        state.slots_changed(executor)
        state.freed = executor
        is_completed = event.outcome is LeaseOutcome.COMPLETED
        executor.activity.ended(state.now_ms - lease.granted_ms, is_completed, state.now_ms)
        if lease.debtor is not None:
            lifecycle.settle(state, lease.debtor, _num_used(state, lease.debtor, event))
            lease.debtor = None
        if record is not None:
            if is_completed:
                _remember(state, record, executor)
            _conclude(state, record, event)
    assert executor.session is not None
    state.send(LeaseAcknowledged(executor.executor_id, executor.session, *key))


def _remember(state: State, record: RequestRecord, executor: ExecutorRecord) -> None:
    """Its session's next request would find the cache there."""
    request = record.request
    state.sessions.served(
        request.tenant, request.session_id, request.model, executor.executor_id, state.now_ms
    )


def _conclude(state: State, record: RequestRecord, event: LeaseEnded) -> None:
    if event.outcome in (LeaseOutcome.COMPLETED, LeaseOutcome.FAILED):
        lifecycle.settle(state, record, _num_used(state, record, event))
    if event.outcome is LeaseOutcome.COMPLETED:
        lifecycle.finish(state, record, None)
    elif event.outcome is LeaseOutcome.FAILED:
        lifecycle.finish(state, record, event.reason or Reason.INTERNAL, event.message)
    else:
        lifecycle.requeue(state, record, _REQUEUED[event.outcome])


def _num_used(state: State, record: RequestRecord, event: LeaseEnded) -> int:
    """What fairness holds against its tenant: what was in a cache cost nobody anything. It is one
    token at least, or whoever always gives up in time would be first for ever."""
    num_output = state.settings.output_token_weight * event.num_generated_tokens
    num_prompt = max(0, record.request.num_prompt_tokens - event.num_cached_tokens)
    return max(1, num_prompt + num_output)


def _num_slots(record: RequestRecord, executor: ExecutorRecord) -> int:
    return min(record.request.num_samples, max(1, executor.num_slots))


def _open(
    state: State, record: RequestRecord, executor: ExecutorRecord, num_slots: int, granted_ms: int
) -> None:
    assert record.lease is None
    record.attempt += 1
    key = (record.request.request_id, state.epoch, record.attempt)
    lease = Lease(key, executor.executor_id, record.request.model, num_slots, granted_ms)
    record.lease = lease
    executor.book(lease)
    _count(state, lease, 1)
    lifecycle.start_clock(state, record)


def close(state: State, executor: ExecutorRecord, lease: Lease) -> None:
    """Give a lease's slots back; the request that it may be of is left to the caller."""
    _give_back(state, executor, lease)
    if lease.debtor is not None:  # what it used will never be known
        lifecycle.settle(state, lease.debtor, 0)
        lease.debtor = None
    state.executor_changed(executor)


def _give_back(state: State, executor: ExecutorRecord, lease: Lease) -> None:
    executor.strike(lease)
    _count(state, lease, -1)
    model = lease.model
    residence = executor.residences.get(model)
    if residence is not None:
        residence.last_used_ms = state.now_ms
        if model not in executor.active:
            residence.held_until_ms = state.now_ms + state.settings.model_hold_ms
    if lease.state is LeaseState.REVOKING:
        state.deadlines.discard(RevokeDue(executor.executor_id, lease.key))
    if model in state.settings.model_limits:
        state.waking.wake(model)


def _count(state: State, lease: Lease, change: int) -> None:
    """Leases of a model in the whole fleet."""
    counts.change(state.num_leased_by_model, lease.model, change)


def reconcile(state: State, executor: ExecutorRecord, held: tuple[HeldLease, ...]) -> None:
    """Compare what an executor holds, just attached, with its books and with the requests."""
    listed: dict[LeaseKey, HeldLease] = {}
    for lease in held:
        record = state.requests.get(lease.request_id)
        if record is not None and lease.epoch == state.epoch and lease.attempt > record.attempt:
            # never granted: believing or booking it would take a name that may yet be given out
            state.count("ignored.stale_lease")
        else:
            listed[lease.request_id, lease.epoch, lease.attempt] = lease
    for booked in list(executor.leases.values()):
        owner = state.owner(booked)
        if booked.key in listed and owner is not None:
            del listed[booked.key]
            _adopt(state, owner, executor, booked.key, booked.num_slots)
        elif booked.key not in listed:
            close(state, executor, booked)
            if owner is not None:
                lifecycle.requeue(state, owner, "not_held")
    for key, held_lease in listed.items():
        _answer(state, executor, key, held_lease)


def _answer(state: State, executor: ExecutorRecord, key: LeaseKey, held: HeldLease) -> None:
    """Decide on a held lease that is not the current one of its request."""
    assert executor.session is not None
    record = state.requests.get(key[0])
    booked = executor.leases.get(key)
    model, num_slots = held.model, held.num_slots if booked is None else booked.num_slots
    if record is not None:
        model, num_slots = record.request.model, min(num_slots, record.request.num_samples)
    if record is not None and record.lease is None and model in executor.offered_models:
        _adopt(state, record, executor, key, num_slots)
    elif held.has_ended:
        if booked is not None:
            close(state, executor, booked)
        state.send(LeaseAcknowledged(executor.executor_id, executor.session, *key))
    else:
        lease = booked or Lease(key, executor.executor_id, model, num_slots, state.now_ms)
        revoke(state, executor, lease)


def _adopt(
    state: State, record: RequestRecord, executor: ExecutorRecord, held: LeaseKey, num_slots: int
) -> None:
    """Let a held lease go on under a new attempt, with the slots that it has."""
    assert executor.session is not None
    old = executor.leases.get(held)
    granted_ms = state.now_ms
    if old is not None and executor.strike(old):
        _count(state, old, -1)
    if record.lease is None:
        state.queue.take(record, state.now_ms)
        state.head_changed(record.request.model)
    else:
        assert record.lease is old
        record.lease = None
        granted_ms = old.granted_ms
    _open(state, record, executor, num_slots, granted_ms)
    state.count("adopted")
    state.send(
        LeaseAdopted(
            executor.executor_id,
            executor.session,
            record.request.request_id,
            held_epoch=held[1],
            held_attempt=held[2],
            attempt=record.attempt,
        )
    )
