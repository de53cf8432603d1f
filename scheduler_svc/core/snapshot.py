"""Queue and fleet as operators see them.

Rule: the queue is shown as it will be granted, with the priority by which models compete inside a
band; nothing is computed for rows that are not asked for, and nothing changes. What later bands are
owed (bands.py) goes earlier than shown.

A row's position is its place in that order, counted over its pool, so that no two requests that
wait for the same homes have the same one. What a client is told of its request (estimate.py) may be
more: it counts whoever may yet go first, so that it does not rise when somebody else gives up. Say
a young request is first in its flow, before an older one of a tenant that had more service. One of
another model, in age between the two, goes before both as things are. But if the first one gives
up, the older one goes before it: so its client counts that one, and hears the number that the first
one does.
"""

from collections import Counter
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Final

from scheduler_svc.core import failing, priority
from scheduler_svc.core.answers import (
    ExecutorRow,
    FailureRow,
    ModelRow,
    QueueRow,
    ReservationRow,
    Snapshot,
)
from scheduler_svc.core.domain import ExecutorRecord, RequestRecord, Reservation
from scheduler_svc.core.estimate import Ahead
from scheduler_svc.core.state import State

# executors or models between two chances for others: a few milliseconds
_ROWS_AT_ONCE: Final = 256


def take(state: State, now_ms: int, max_rows: int) -> Snapshot:
    """The first ``max_rows`` of the queue, and the whole fleet, at one instant."""
    made = parts(state, now_ms, max_rows)
    try:
        next(made)
        while True:
            made.send(now_ms)
    except StopIteration as end:
        found: Snapshot = end.value
        return found


def parts(state: State, now_ms: int, max_rows: int) -> Generator[None, int, Snapshot]:
    """The same, made bit by bit: events may be handled whenever it yields, and it is sent the time
    then. The queue is of one instant, of executors and models each row."""
    shifts = {
        model: priority.shift(state.settings, state.fleet.warmth(model))
        for model in state.queue.num_by_model
    }
    overdue_before = state.waking.overdue_before(now_ms)
    records = islice(state.queue.in_order(shifts, overdue_before), max_rows)
    num_waiting, num_live = len(state.queue), len(state.requests)
    queue = tuple(_queue_rows(state, records, now_ms))
    now_ms = yield
    known = list(state.fleet.executors.values())
    num_leases = sum(executor.activity.num_leases(now_ms) for executor in known)
    executors: list[ExecutorRow] = []
    for first in range(0, len(known), _ROWS_AT_ONCE):
        now_ms = yield
        for executor in known[first : first + _ROWS_AT_ONCE]:
            executors.append(_executor_row(state, executor, num_leases, now_ms))
    names = sorted(state.totals.models)
    models: list[ModelRow] = []
    for first in range(0, len(names), _ROWS_AT_ONCE):
        now_ms = yield
        for model in names[first : first + _ROWS_AT_ONCE]:
            if model in state.totals.models:  # not forgotten meanwhile
                models.append(_model_row(state, model, now_ms))
    return Snapshot(
        num_waiting=num_waiting,
        num_running=num_live - num_waiting,
        queue=queue,
        executors=tuple(executors),
        decisions=dict(state.decisions),
        queue_wait_ms=state.waits.summary(now_ms),
        sessions=state.sessions.totals(),
        models=tuple(models),
    )


def executor_row(state: State, executor_id: str, now_ms: int) -> ExecutorRow | None:
    """One executor; None if it is not known."""
    executor = state.fleet.executors.get(executor_id)
    return None if executor is None else _executor_row(state, executor, 0, now_ms)


def _model_row(state: State, model: str, now_ms: int) -> ModelRow:
    totals = state.totals.models[model]
    num_waiting = state.queue.num_by_model.get(model, 0)
    return ModelRow(
        model=model,
        num_requests=totals.num_requests,
        num_tokens=totals.num_tokens,
        num_sessions=state.sessions.num_by_model.get(model, 0),
        num_waiting=num_waiting,
        num_running=state.num_live_by_model.get(model, 0) - num_waiting,
        num_homes=len(state.fleet.homes.get(model, ())),
        failure=_failure_row(state, model, now_ms),
    )


def _failure_row(state: State, model: str, now_ms: int) -> FailureRow | None:
    known = state.failing.get(model)
    if known is None or not known.message:
        return None
    refused_ms = max(0, known.refused_until_ms - now_ms)
    return FailureRow(known.message, failing.num_failed(state, model), refused_ms)


def _queue_rows(state: State, records: Iterator[RequestRecord], now_ms: int) -> Iterator[QueueRow]:
    """``records``: from the first on, as they will be granted."""
    num_before: dict[str, int] = {}
    num_own: Counter[tuple[int, str, str]] = Counter()
    for record in records:
        request = record.request
        model, own = request.model, (request.band, request.model, request.tenant)
        pool = state.fleet.pool(model).warmth
        num = sum(num_before.get(other, 0) for other in pool)
        ahead = Ahead(num, num_own[own], num_before.get(model, 0))
        yield _queue_row(state, record, ahead, now_ms)
        num_before[model] = num_before.get(model, 0) + 1
        num_own[own] += 1


def _queue_row(state: State, record: RequestRecord, ahead: Ahead, now_ms: int) -> QueueRow:
    request = record.request
    waited_ms = now_ms - record.accepted_ms
    return QueueRow(
        request_id=request.request_id,
        model=request.model,
        tenant=request.tenant,
        band=request.band,
        waited_ms=waited_ms,
        status=state.estimator.waiting(record, ahead, now_ms),
        session_id=request.session_id,
        num_tokens=request.num_tokens,
        priority=priority.points(state.settings, waited_ms, state.fleet.warmth(request.model)),
    )


def _executor_row(
    state: State, executor: ExecutorRecord, num_all_leases: int, now_ms: int
) -> ExecutorRow:
    word = "draining" if executor.is_draining else "attached"
    return ExecutorRow(
        executor_id=executor.executor_id,
        state="lost" if executor.session is None else word,
        num_slots=executor.num_slots,
        num_free=executor.num_free,
        num_leased=executor.num_leased,
        num_in_doubt=executor.num_in_doubt,
        resident_models=executor.resident_models,
        max_models=executor.max_models,
        loading_model=None if executor.loading is None else executor.loading.model,
        held_models=tuple(
            model
            for model, residence in executor.residences.items()
            if model not in executor.active and residence.held_until_ms > now_ms
        ),
        # without the leases of an earlier scheduler whose model nobody knows
        active_models=tuple(model for model in executor.active if model),
        reservation=_reservation_row(executor.reservation, now_ms),
        stats=executor.activity.summary(num_all_leases, _affinity(state, executor), now_ms),
    )


def _affinity(state: State, executor: ExecutorRecord) -> float | None:
    tally = state.sessions.tally(executor.executor_id)
    num_preferred = tally.num_hits + tally.num_misses
    return tally.num_hits / num_preferred if num_preferred else None


def _reservation_row(reservation: Reservation | None, now_ms: int) -> ReservationRow | None:
    if reservation is None:
        return None
    return ReservationRow(
        reservation.model,
        reservation.why,
        now_ms - reservation.since_ms,
        max(0, reservation.deadline_ms - now_ms),
    )
