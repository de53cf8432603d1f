"""What the decision log says: for each decision one line, with the candidates and their scores.

Rule: only with ``has_decision_log``; nothing here changes anything, so that the same is decided
with the log and without it. A line names a few candidates, however many there were.
"""

from typing import Final

from scheduler_svc.core import placement, priority
from scheduler_svc.core.domain import ExecutorRecord, RequestRecord, Why
from scheduler_svc.core.state import State

_MOST_NAMED: Final = 4


def grant(state: State, record: RequestRecord, executor: ExecutorRecord) -> str:
    """How a request ranks, where it goes, why there, and the first of each row that it could have
    had."""
    request = record.request
    waited_ms = state.now_ms - record.accepted_ms
    rank = state.waking.rank(record)
    ranked = f"band {request.band}"
    if rank[0] != request.band:
        ranked += f" counting as {rank[0]}"
    points = priority.points(state.settings, waited_ms, state.fleet.warmth(request.model))
    if points is not None:
        ranked += f", priority {points:.1f}"
    usage = [_usage(other) for _, other in placement.fronts(state, record, rank)]
    return (
        f"to {executor.executor_id} after {waited_ms} ms, {ranked}: "
        f"{_why_there(state, record, executor)}; used slots: {named(usage)}"
    )


def _why_there(state: State, record: RequestRecord, executor: ExecutorRecord) -> str:
    request, reservation = record.request, executor.reservation
    if reservation is not None and placement.num_missing(record, executor) > 0:
        return f"will end before the drain for {reservation.model} does"
    if request.session_id and executor.executor_id == state.sessions.preferred(
        request.tenant, request.session_id, request.model, state.now_ms
    ):
        return "its session was there"
    num_blocks = state.prefixes.longest(request.prefix_hashes).get(executor.executor_id)
    if num_blocks:
        return f"{num_blocks} blocks of its prompt were there"
    return "least used"


def drain(state: State, why: Why, empty: list[tuple[int, ExecutorRecord]]) -> str:
    """Why a model gets this executor; ``empty``: (expected then, candidate), the chosen first."""
    chosen = empty[0][1].executor_id
    scores = [f"{other.executor_id} in {at_ms - state.now_ms} ms" for at_ms, other in empty]
    return f"{why} on {chosen}; expected empty: {named(scores)}"


def load(
    state: State, model: str, kind: str, targets: list[tuple[tuple[str, ...], ExecutorRecord]]
) -> str:
    """Why a model is loaded, and there; ``targets``: (what has to go, candidate), the chosen
    first."""
    num_waiting = state.queue.num_by_model[model]
    waited_ms = state.queue.waited_ms(model, state.now_ms)
    scores = []
    for evict, executor in targets:
        load_ms = executor.load_ms.get(model)
        cost = "unknown time" if load_ms is None else f"{load_ms} ms"
        scores.append(f"{_usage(executor)} in {cost} evicting {', '.join(evict) or 'nothing'}")
    return (
        f"{kind} on {targets[0][1].executor_id}, for {num_waiting} that waited {waited_ms} ms "
        f"together; candidates: {named(scores)}"
    )


def _usage(executor: ExecutorRecord) -> str:
    return f"{executor.executor_id} {executor.num_used}/{executor.num_slots}"


def named(scores: list[str]) -> str:
    """The first few, and how many more there are."""
    more = len(scores) - _MOST_NAMED
    return ", ".join(scores[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "") or "none"
