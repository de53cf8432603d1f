"""The scheduler's brain: one event in, effects out.

Rule: ``handle`` applies one event, then places whatever the event made placeable, by rank. Same
events at the same times, same effects. Time runs out on Tick only, so that what executors already
said is heard before a late Tick counts it as missing; but placement never grants a request whose
clock ran out, so a late Tick cannot turn into a late grant. At the very millisecond of a deadline
whichever event comes first decides, and only it.

Order: the rank of heads (priority.py), models that need a place among them by their claim, or in
their turn once they have waited for E; bands one after another except for what later ones are owed
(bands.py), tenants of a flow by fairness (queue.py). A blocked head blocks only its own model, in
its band and those after.
"""

from collections.abc import Generator

from headway.reasons import Reason
from scheduler_svc.core import (
    admission,
    failing,
    handover,
    invariants,
    leases,
    lifecycle,
    placement,
    residency,
    sessions,
    snapshot,
    waiting,
)
from scheduler_svc.core.answers import ExecutorRow, RequestStatus, Snapshot
from scheduler_svc.core.deadlines import (
    GraceDue,
    LoadDue,
    ModelDue,
    RefusalDue,
    ReservationDue,
    RevokeDue,
)
from scheduler_svc.core.domain import CoreSettings, ExecutorRecord, RequestRecord
from scheduler_svc.core.messages import (
    Cancel,
    CloseDoor,
    DrainExecutor,
    Effects,
    Event,
    ExecutorAttached,
    ExecutorCapacityChanged,
    ExecutorDisconnected,
    LeaseEnded,
    LeaseStarted,
    ModelChanged,
    Submit,
    Tick,
    UndrainExecutor,
)
from scheduler_svc.core.state import State


class Scheduler:
    """Decides who goes next, and where. Not thread-safe: one task owns it."""

    def __init__(self, settings: CoreSettings, epoch: int) -> None:
        self._state = State(settings, epoch)

    def handle(self, event: Event, now_ms: int) -> Effects:
        """Apply an event; ``now_ms`` must never be smaller than before."""
        state = self._state
        assert now_ms >= state.now_ms
        state.now_ms = state.waking.now_ms = now_ms
        state.waking.contested = None
        match event:
            case Submit():
                admission.submit(state, event.request)
            case LeaseEnded():
                executor = sessions.current(state, event.executor_id, event.session)
                if executor is not None:
                    leases.ended(state, executor, event)
                    sessions.tell_drained(state, executor)
            case Cancel():
                self._cancel(event)
            case ExecutorAttached():
                sessions.attach(state, event)
            case DrainExecutor():
                sessions.set_draining(state, event.executor_id, True)
            case UndrainExecutor():
                sessions.set_draining(state, event.executor_id, False)
            case CloseDoor():
                state.is_closing = True
            case Tick():
                self._expire()
            case _:
                executor = sessions.current(state, event.executor_id, event.session)
                if executor is not None:
                    self._heard(executor, event)
        self._place()
        return state.take_effects()

    def _heard(
        self,
        executor: ExecutorRecord,
        event: ExecutorCapacityChanged | ExecutorDisconnected | ModelChanged | LeaseStarted,
    ) -> None:
        """An executor said something on its current session, or the session broke."""
        match event:
            case ExecutorCapacityChanged():
                sessions.change_capacity(self._state, executor, event)
            case ExecutorDisconnected():
                sessions.lose(self._state, executor)
            case ModelChanged():
                residency.changed(self._state, executor, event)
            case LeaseStarted():
                self._started(executor, event)

    def _cancel(self, event: Cancel) -> None:
        record = self._state.requests.get(event.request_id)
        if record is not None and record.request.tenant == event.tenant:
            lifecycle.finish(self._state, record, Reason.CANCELLED, "The client cancelled it.")
            leases.revoke_current(self._state, record)

    def _started(self, executor: ExecutorRecord, event: LeaseStarted) -> None:
        key = (event.request_id, self._state.epoch, event.attempt)
        record = self._state.requests.get(event.request_id)
        if record is None or record.lease is None or record.lease is not executor.leases.get(key):
            self._state.count("ignored.stale_lease")
        elif record.first_token_ms is None:
            record.first_token_ms = self._state.now_ms

    def _expire(self) -> None:
        state = self._state
        while (due := state.deadlines.pop_due(state.now_ms)) is not None:
            match due:
                case RequestRecord():
                    lifecycle.overdue(state, due)
                    leases.revoke_current(state, due)
                case RevokeDue():
                    state.count("session_closed.revoke_timeout")
                    executor = state.fleet.executors[due.executor_id]
                    sessions.close(state, executor, "A revoke was not confirmed in time.")
                case GraceDue():
                    sessions.forget(state, state.fleet.executors[due.executor_id])
                case LoadDue():
                    executor = state.fleet.executors[due.executor_id]
                    residency.failed(state, executor, "It took too long.")
                    state.count("session_closed.load_timeout")
                    sessions.close(state, executor, "A load was not answered in time.")
                case ReservationDue():
                    state.end_reservation(due.model, "deadline")
                case ModelDue():
                    state.waking.wake(due.model)
                case RefusalDue():
                    failing.end_waiting(state, due.model)

    def _place(self) -> None:
        """Grant what can be granted; looks at models that are awake only, best rank first."""
        state = self._state
        if state.freed is not None:
            executor, state.freed = state.freed, None
            handover.hand_over(state, executor)
        waking = state.waking
        while waking.awake and (head := waking.next_awake()) is not None:
            if state.now_ms > head.deadline_ms:
                lifecycle.overdue(state, head)
                continue
            rank = state.waking.rank(head)
            found, model = None, head.request.model
            if (
                state.fleet.has_usable(model) or state.fleet.reservations
            ) and not state.is_at_limit(model):
                found = placement.pick(state, head, rank)
            if found is None:
                waiting.wait(state, head, rank)
                continue
            handover.give(state, head, found)
            state.head_changed(model)
            if not found.num_free:
                state.waking.sleep_hopeless(found)

    # --- questions: they change nothing -------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._state.queue)

    @property
    def num_running(self) -> int:
        """Requests with a lease, in doubt or not."""
        return len(self._state.requests) - len(self._state.queue)

    @property
    def decisions(self) -> dict[str, int]:
        """How often what was decided, by name, such as "granted" or "rejected.QUEUE_FULL"."""
        return dict(self._state.decisions)

    def next_deadline_ms(self) -> int | None:
        """When a Tick is due at the latest; None if nothing will happen by itself."""
        return self._state.deadlines.next_ms()

    def is_live(self, request_id: str) -> bool:
        """Whether a request was accepted and has not finished."""
        return request_id in self._state.requests

    def current_lease(self, request_id: str) -> tuple[str, int, int] | None:
        """(executor_id, session, attempt) that speaks for a request; None if none can now."""
        record = self._state.requests.get(request_id)
        if record is None or record.lease is None:
            return None
        executor = self._state.fleet.executors[record.lease.executor_id]
        if executor.session is None:
            return None
        return executor.executor_id, executor.session, record.attempt

    def status(self, request_id: str, now_ms: int) -> RequestStatus | None:
        """Where a live request stands, None if it is not live."""
        record = self._state.requests.get(request_id)
        return None if record is None else self._state.estimator.status(record, now_ms)

    def snapshot(self, now_ms: int, max_rows: int) -> Snapshot:
        """The first ``max_rows`` of the queue as it will be granted, and the whole fleet."""
        return snapshot.take(self._state, now_ms, max_rows)

    def snapshot_in_parts(self, now_ms: int, max_rows: int) -> Generator[None, int, Snapshot]:
        """The same for a large fleet: events may be handled whenever it yields, and it is sent the
        time then."""
        return snapshot.parts(self._state, now_ms, max_rows)

    def executor(self, executor_id: str, now_ms: int) -> ExecutorRow | None:
        """One executor, without its share of all leases; None if it is not known."""
        return snapshot.executor_row(self._state, executor_id, now_ms)

    def check_invariants(self) -> None:
        """Assert what must hold between events; for tests, it looks at everything."""
        invariants.check(self._state)
