"""Where a request may run now: on an executor that has its model, has room, and is not barred.

Rule: a lease takes min(num_samples, the executor's slots), so that every request fits everywhere
once it is empty. First choice is the executor that served the request's session last, then the
one that has most of its prompt's prefix cached; both are hints, worth nothing where there is no
room. Then the least loaded by used share, equal shares in turn. Last, if all homes are taken or
reserved, an executor that drains for another model, if the request surely ends before the drain
does (backfill, after EASY: Lifka, "The ANL/IBM SP scheduling system", 1995).

Locality (``jump``): of the next few tenants in a flow, one whose session or prefix is cached on the
executor that was found may pass the head by at most locality_quantum_tokens (fairness.py). Who
passes goes with the age of the head, against other flows too, so a head is passed
locality_max_passes times at most: cheap requests would else go on for all tokens of the quantum.
"""

from collections.abc import Iterator
from typing import Final

from scheduler_svc.core.domain import ExecutorRecord, Rank, RequestRecord, Why
from scheduler_svc.core.shelves import RowKey
from scheduler_svc.core.state import State

# tenants after the first that are looked at for one whose cache is there
_NUM_RIVALS: Final = 2


def pick(state: State, record: RequestRecord, rank: Rank) -> ExecutorRecord | None:
    """The executor that a head is to be granted to now, None if it must wait."""
    request = record.request
    if (request.session_id or request.prefix_hashes) and state.fleet.has_choice(request.model):
        hinted = _hinted(state, record, rank)
        if hinted is not None:
            return hinted
    best: ExecutorRecord | None = None
    best_key = (0.0, 0, 0)
    for (num_used, turn, number), executor in fronts(state, record, rank):
        if num_missing(record, executor) <= 0:
            key = (num_used / executor.num_slots, turn, number)
            if best is None or key < best_key:
                best, best_key = executor, key
    return best or (_backfill(state, record) if state.fleet.reservations else None)


def fronts(
    state: State, record: RequestRecord, rank: Rank
) -> Iterator[tuple[RowKey, ExecutorRecord]]:
    """The first executor of each row that is not claimed ahead of this request."""
    model = record.request.model
    executors = state.fleet.executors
    for row in state.fleet.rows(model):
        skipped = []
        while (first := row.peek()) is not None and is_claimed(executors[first[1]], record, rank):
            skipped.append(first)
            row.discard(first[1])
        for key, executor_id in skipped:
            row.set(executor_id, key)
        if first is not None:
            yield first[0], executors[first[1]]


def num_missing(record: RequestRecord, executor: ExecutorRecord) -> int:
    """Slots that must still become free there; not above 0 means that it fits."""
    num_open = executor.num_free - executor.num_kept_from(record.request.model)
    return min(record.request.num_samples, executor.num_slots) - num_open


def is_claimed(executor: ExecutorRecord, record: RequestRecord, rank: Rank) -> bool:
    """Whether another wide head, be it of its own model, has this executor before this request."""
    reservation = executor.reservation
    return (
        reservation is not None
        and reservation.why is Why.WIDE
        and reservation.rank < rank
        and reservation.request_id != record.request.request_id
    )


def can_take(executor: ExecutorRecord, record: RequestRecord, rank: Rank) -> bool:
    """Whether a request may be granted there now."""
    return (
        executor.is_serving
        and record.request.model in executor.residences
        and num_missing(record, executor) <= 0
        and not is_claimed(executor, record, rank)
    )


def _hinted(state: State, record: RequestRecord, rank: Rank) -> ExecutorRecord | None:
    """The executor that may still hold the request's session or prefix, if it has room."""
    request = record.request
    executors = state.fleet.executors
    if request.session_id:
        preferred = state.sessions.preferred(
            request.tenant, request.session_id, request.model, state.now_ms
        )
        executor = executors.get(preferred or "")
        if executor is not None and can_take(executor, record, rank):
            return executor
    best: ExecutorRecord | None = None
    best_key = (0, 0.0, 0)
    for executor_id, num_blocks in state.prefixes.longest(request.prefix_hashes).items():
        executor = executors.get(executor_id)
        if executor is None or not can_take(executor, record, rank):
            continue
        key = (-num_blocks, executor.num_used / executor.num_slots, executor.number)
        if best is None or key < best_key:
            best, best_key = executor, key
    return best


def _backfill(state: State, record: RequestRecord) -> ExecutorRecord | None:
    """An executor that drains, where the request surely ends before the drain does."""
    model = record.request.model
    longest_ms = state.estimator.longest_ms(record.request)
    if longest_ms is None:
        return None
    for reservation in state.fleet.reservations.values():
        if reservation.model == model or not reservation.num_kept:
            continue
        executor = state.fleet.executors[reservation.executor_id]
        num_slots = min(record.request.num_samples, executor.num_slots)
        if (
            model in executor.residences
            and executor.is_serving
            and num_slots <= executor.num_free
            and state.now_ms + longest_ms <= reservation.expected_ms
        ):
            return executor
    return None


def jump(state: State, head: RequestRecord, executor: ExecutorRecord) -> RequestRecord:
    """Who of the head's flow is granted on an executor: the head, unless it saves nothing there
    and one of the next few tenants', within the locality quantum of it, does."""
    request, settings = head.request, state.settings
    if (
        not settings.locality_quantum_tokens
        or head.num_passed >= settings.locality_max_passes
        or _saves(state, head, executor)
    ):
        return head
    for other in state.queue.flows[request.model][request.band].rivals(_NUM_RIVALS):
        if _saves(state, other, executor) and num_missing(other, executor) <= 0:
            head.num_passed += 1
            state.count("position_rose.locality")
            if settings.has_decision_log:
                state.decide("overtake", other, "its cache is there")
            return other
    return head


def _saves(state: State, record: RequestRecord, executor: ExecutorRecord) -> bool:
    """Whether the executor may hold the cache of a request's session or prefix."""
    request, executor_id = record.request, executor.executor_id
    if request.session_id and executor_id == state.sessions.preferred(
        request.tenant, request.session_id, request.model, state.now_ms
    ):
        return True
    return state.prefixes.has_any(executor_id, request.prefix_hashes)
