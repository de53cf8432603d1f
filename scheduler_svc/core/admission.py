"""The door: accept a request, or refuse it with a reason before it costs anything.

Rule: what was asked before under the same key is answered first, also while the door closes: it
is no new work. Then the refusals, cheapest and most lasting first. A model that no executor ever
offered is not found; one that is merely away (nobody attached yet, its executors gone or draining)
or that nobody can load (failing.py) is a lack of capacity that may pass. The queue's bounds hold
for everybody, so a full queue refuses even what could run at once; they are a little lower for
later bands (queue.py).

Last, a request whose start is predicted beyond its queue deadline is refused at once rather than
after it waited in vain. Conservative: the rate must be measured, and even twice that rate would
not be enough. The place that fairness would give it is counted, not the end of the queue, so one
tenant's backlog closes the door to nobody else.
"""

from typing import Final

from headway.reasons import Reason
from scheduler_svc.core import failing, lifecycle
from scheduler_svc.core.domain import RETRYABLE
from scheduler_svc.core.messages import (
    Request,
    RequestAdmitted,
    RequestDeduplicated,
    RequestRejected,
)
from scheduler_svc.core.state import State

# rates may turn out so many times better than measured
_OPTIMISM: Final = 2


def submit(state: State, request: Request) -> None:
    """Answer a new request with exactly one effect."""
    known = state.keys.find(request, state.now_ms) if request.idempotency_key else None
    if known is not None and known.body_hash == request.body_hash:
        state.count("deduplicated")
        state.send(RequestDeduplicated(request.request_id, known.request_id))
        return
    if known is not None or request.request_id in state.requests:
        refusal: tuple[Reason, str] | None = (
            Reason.REQUEST_ID_CONFLICT,
            "The key or id is that of another request.",
        )
    else:
        refusal = refuse(state, request)
    if refusal is None:
        state.count("admitted")
        state.record(RequestAdmitted(request))
        lifecycle.accept(state, request)
    else:
        _reject(state, request, *refusal)


def refuse(state: State, request: Request) -> tuple[Reason, str] | None:
    """Why a request cannot be accepted now; None if it can."""
    limits = state.settings
    if not 0 <= request.band < limits.num_bands:
        return Reason.INVALID_REQUEST, f"Priority must be below {limits.num_bands}."
    if state.is_closing:
        return Reason.DRAINING, "The scheduler is shutting down."
    if not state.known_models:
        return Reason.NO_CAPACITY, "No executor has attached yet."
    if request.model not in state.known_models:
        return Reason.MODEL_NOT_FOUND, f"No executor offers the model {request.model!r}."
    if not state.fleet.offer(request.model).is_there:
        return Reason.NO_CAPACITY, f"No executor has the model {request.model!r} at the moment."
    if failing.is_refused(state, request.model):
        return Reason.NO_CAPACITY, failing.explain(state, request.model)
    if state.num_live_by_tenant.get(request.tenant, 0) >= limits.max_inflight_per_tenant:
        return Reason.QUOTA_EXCEEDED, "The tenant has too many requests in flight."
    if len(state.requests) >= limits.max_inflight:
        return Reason.QUEUE_FULL, "Too many requests are in flight."
    if state.num_live_by_model.get(request.model, 0) >= limits.max_inflight_per_model:
        return Reason.QUEUE_FULL, "Too many requests are in flight for the model."
    if not state.queue.has_room(request):
        return Reason.QUEUE_FULL, "The queue is full."
    if _is_late(state, request):
        return Reason.DEADLINE_UNREACHABLE, "It would not start before its queue deadline."
    return None


def _is_late(state: State, request: Request) -> bool:
    """Whether it is known to start after its deadline; cheap upper bounds are asked first."""
    if not len(state.queue):
        return False
    estimator = state.estimator
    return (
        _is_late_at(state, request, len(state.queue))
        and _is_late_at(state, request, estimator.depth(request.model))
        and _is_late_at(state, request, estimator.position_of_new(request, state.next_arrival()))
    )


def _is_late_at(state: State, request: Request, position: int) -> bool:
    wait_ms = state.estimator.measured_wait_ms(request.model, position, state.now_ms)
    return wait_ms is not None and wait_ms > _OPTIMISM * request.queue_timeout_ms


def _reject(state: State, request: Request, reason: Reason, message: str) -> None:
    state.count(f"rejected.{reason}")
    retry_after_ms = None
    is_away = reason in (Reason.NO_CAPACITY, Reason.DRAINING)
    if is_away and not failing.is_refused(state, request.model):
        # the time in which a lost executor, or the next scheduler, is expected
        retry_after_ms = state.estimator.clamp(state.settings.executor_grace_ms)
    elif reason in RETRYABLE:
        retry_after_ms = state.retry_after_ms(request.model)
    if state.settings.has_decision_log:
        state.refuse(request, f"{reason}: {message}")
    state.send(RequestRejected(request.request_id, reason, message, retry_after_ms))
