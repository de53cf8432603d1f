"""What happens to a request, from acceptance to its one end.

Rule: every request is in ``State.requests`` from acceptance to its end, and there either in the
queue or leased. ``finish`` is the compare-and-set of the end: it takes the record out of
``requests``, so a second end finds nothing to end. What its tenant was charged is settled once for
each lease, when that ends, though the request may be over by then.
"""

from headway.reasons import Reason
from scheduler_svc.core import counts
from scheduler_svc.core.domain import RETRYABLE, RequestRecord
from scheduler_svc.core.messages import Request, RequestFinished
from scheduler_svc.core.state import State


def accept(state: State, request: Request) -> None:
    """A new request starts to wait; the caller checked the bounds."""
    state.last_arrival = arrival = state.next_arrival()
    deadline_ms = state.now_ms + request.queue_timeout_ms
    record = RequestRecord(request, arrival, state.now_ms, deadline_ms)
    record.nowhere_ms = state.totals.nowhere_ms(request.model, state.now_ms)
    state.requests.add(record)
    counts.change(state.num_live_by_tenant, request.tenant, 1)
    counts.change(state.num_live_by_model, request.model, 1)
    state.keys.add(request)
    state.deadlines.set(record, deadline_ms)
    state.queue.add(record)
    state.estimator.accepted(record, state.now_ms)
    if state.queue.is_anybody_after(request.band):
        state.count("position_rose.earlier_band")
    if state.settings.has_decision_log:
        _log_overtaking(state, record)
    if state.queue.is_head(record):
        if state.queue.num_by_model[request.model] > 1:
            state.count("position_rose.less_served")
        state.head_changed(request.model)
    elif state.fleet.has_open(request.model):
        state.waking.wake(request.model)


def _log_overtaking(state: State, record: RequestRecord) -> None:
    """A request that just came goes before some that came earlier: say why."""
    request = record.request
    num_later = sum(
        len(flow.everybody)
        for flows in state.queue.bands[request.band + 1 :]
        for flow in flows.values()
    )
    if num_later:
        state.decide("overtake", record, f"{num_later} of later bands")
    flow = state.queue.flows[request.model][request.band]
    num_overtaken = len(flow.everybody) - 1 - flow.place(record).num_before
    if num_overtaken:
        state.decide("overtake", record, f"{num_overtaken} of tenants that had more service")


def finish(state: State, record: RequestRecord, reason: Reason | None, message: str = "") -> None:
    """End a live request; a lease that it has stays in its executor's books."""
    request = record.request
    state.requests.remove(record)
    counts.change(state.num_live_by_tenant, request.tenant, -1)
    counts.change(state.num_live_by_model, request.model, -1)
    state.keys.finished(request, reason not in RETRYABLE, state.now_ms)
    state.deadlines.discard(record)
    if record.lease is None:
        state.queue.remove(record)
        state.head_changed(request.model)
    elif record.num_charged_tokens:
        executor = state.fleet.executors[record.lease.executor_id]
        if executor.leases.get(record.lease.key) is record.lease:
            record.lease.debtor = record
        else:
            settle(state, record, 0)
    state.count("finished.OK" if reason is None else f"finished.{reason}")
    state.record(_end_of(state, record, reason, message))


def settle(state: State, record: RequestRecord, num_used_tokens: int) -> None:
    """A lease came to its end: its tenant pays what was used, not what might have been."""
    num_charged = record.num_charged_tokens
    state.queue.settle(record, num_used_tokens)
    if state.settings.has_decision_log and num_used_tokens < num_charged:
        request = record.request
        flow = state.queue.flows.get(request.model, {}).get(request.band)
        if flow is not None and flow.competes(request.tenant):
            state.decide("refund", record, f"{num_charged - num_used_tokens} tokens")
    model = record.request.model
    if model in state.fleet.reservations:  # it may be for who was the head before
        state.head_changed(model)


def requeue(state: State, record: RequestRecord, why: str) -> None:
    """A leased request goes back to the head of its flow; its execution clock runs on."""
    record.lease = None
    record.is_returned = True
    state.queue.settle(record, 0)
    state.queue.add(record)
    state.count(f"requeued.{why}")
    state.count("position_rose.requeued")
    if state.settings.has_decision_log:
        state.decide("requeue", record, why)
    state.head_changed(record.request.model)


def start_clock(state: State, record: RequestRecord) -> None:
    """The first grant ends the queueing clock and starts the executing one."""
    if record.first_grant_ms is None:
        record.first_grant_ms = state.now_ms
        model = record.request.model
        record.nowhere_ms = state.totals.nowhere_ms(model, state.now_ms) - record.nowhere_ms
        state.totals.granted(model, record.request.num_tokens)
        state.waits.add(state.now_ms - record.accepted_ms, state.now_ms)
        record.deadline_ms = state.now_ms + record.request.execution_timeout_ms
        state.deadlines.set(record, record.deadline_ms)


def overdue(state: State, record: RequestRecord) -> None:
    """The running clock of a request ran out; the caller revokes what is leased."""
    if record.first_grant_ms is None:
        finish(state, record, Reason.QUEUE_TIMEOUT, "No executor was free in time.")
    else:
        finish(state, record, Reason.EXECUTION_TIMEOUT, "The execution took too long.")


def _end_of(
    state: State, record: RequestRecord, reason: Reason | None, message: str
) -> RequestFinished:
    request, accepted_ms = record.request, record.accepted_ms
    granted_ms, token_ms = record.first_grant_ms, record.first_token_ms
    retry_after_ms = None
    if reason in RETRYABLE:
        retry_after_ms = state.retry_after_ms(request.model)
    return RequestFinished(
        request.request_id,
        reason,
        message,
        queued_ms=None if granted_ms is None else granted_ms - accepted_ms,
        first_token_ms=None if token_ms is None else token_ms - accepted_ms,
        total_ms=state.now_ms - accepted_ms,
        num_attempts=record.attempt,
        retry_after_ms=retry_after_ms,
        model_wait_ms=None if granted_ms is None else record.nowhere_ms,
    )
