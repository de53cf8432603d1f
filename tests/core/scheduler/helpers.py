"""A scheduler with a clock and few words to drive it; every event is followed by a check."""

from dataclasses import replace
from typing import Any

import pytest

from headway.reasons import Reason
from scheduler_svc.core import scheduler
from scheduler_svc.core.answers import ExecutorRow, RequestStatus
from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.core.messages import (
    Action,
    Cancel,
    DrainExecutor,
    Event,
    ExecutorAttached,
    ExecutorCapacityChanged,
    ExecutorDisconnected,
    HeldLease,
    LeaseEnded,
    LeaseGranted,
    LeaseOutcome,
    LeaseStarted,
    ModelOffer,
    Request,
    RequestFinished,
    RequestRejected,
    Submit,
    Tick,
    UndrainExecutor,
)
from scheduler_svc.core.scheduler import Scheduler

EPOCH = 7

# for tests that replace a function of the core, which calls of compiled code do not notice
interpreted_only = pytest.mark.skipif(
    not scheduler.__file__.endswith(".py"), reason="the core is compiled"
)

REQUEST = Request(
    request_id="r",
    tenant="t",
    model="A",
    band=0,
    num_prompt_tokens=10,
    max_tokens=20,
    num_samples=1,
    num_bytes=100,
    queue_timeout_ms=60_000,
    execution_timeout_ms=600_000,
)


def request(request_id: str, model: str = "A", **changes: Any) -> Request:
    """A request with the given fields changed."""
    return replace(REQUEST, request_id=request_id, model=model, **changes)


def held(
    request_id: str,
    attempt: int = 1,
    epoch: int = EPOCH,
    *,
    model: str = "A",
    num_slots: int = 1,
    ended: bool = False,
) -> HeldLease:
    """What an executor says that it still holds."""
    return HeldLease(request_id, epoch, attempt, model, num_slots, ended)


class Driver:
    """Keeps time, sessions and everything that was sent."""

    def __init__(self, **settings: Any) -> None:
        self.core = Scheduler(CoreSettings(**settings), EPOCH)
        self.now_ms = 1_000
        self.sent: list[Action] = []
        self.sessions: dict[str, int] = {}
        self.attempts: dict[str, int] = {}

    def handle(self, event: Event) -> list[Action]:
        """Apply an event now; what was sent."""
        effects = self.core.handle(event, self.now_ms)
        self.core.check_invariants()
        persisted = list(effects.persist)
        assert persisted == [action for action in effects.send if action in persisted]
        for action in effects.send:
            if isinstance(action, LeaseGranted):
                self.attempts[action.request_id] = action.attempt
        self.sent += effects.send
        return list(effects.send)

    def advance(self, ms: int) -> list[Action]:
        """Let time pass, with a Tick at every deadline on the way and one at the end."""
        end_ms = self.now_ms + ms
        sent: list[Action] = []
        while (due := self.core.next_deadline_ms()) is not None and due < end_ms:
            self.now_ms = max(self.now_ms, due)
            sent += self.handle(Tick())
        self.now_ms = end_ms
        return sent + self.handle(Tick())

    def submit(self, request_id: str, model: str = "A", **changes: Any) -> list[Action]:
        """A client asks."""
        return self.handle(Submit(request(request_id, model, **changes)))

    def cancel(self, request_id: str, tenant: str = "t") -> list[Action]:
        """A client gives up."""
        return self.handle(Cancel(request_id, tenant))

    def attach(
        self,
        executor_id: str = "e1",
        num_slots: int = 1,
        models: str = "A",
        *,
        incarnation: str = "i1",
        holds: tuple[HeldLease, ...] = (),
    ) -> list[Action]:
        """An executor opens its next session; models are single letters, all resident."""
        return self.handle(self.attachment(executor_id, num_slots, models, incarnation, holds))

    def attachment(
        self,
        executor_id: str,
        num_slots: int = 1,
        models: str = "A",
        incarnation: str = "i1",
        holds: tuple[HeldLease, ...] = (),
    ) -> ExecutorAttached:
        """The event of that, not handled yet."""
        self.sessions[executor_id] = self.sessions.get(executor_id, 0) + 1
        offers = tuple(ModelOffer(model, is_resident=True) for model in models)
        session = self.sessions[executor_id]
        return ExecutorAttached(executor_id, session, incarnation, num_slots, 4, offers, holds)

    def disconnect(self, executor_id: str = "e1") -> list[Action]:
        """Its session breaks."""
        return self.handle(ExecutorDisconnected(executor_id, self.sessions[executor_id]))

    def resize(self, executor_id: str, num_slots: int) -> list[Action]:
        """Its capacity changes."""
        session = self.sessions[executor_id]
        return self.handle(ExecutorCapacityChanged(executor_id, session, num_slots, 4))

    def drain(self, executor_id: str = "e1") -> list[Action]:
        """An operator takes it out of service."""
        return self.handle(DrainExecutor(executor_id))

    def undrain(self, executor_id: str = "e1") -> list[Action]:
        """An operator takes it back into service."""
        return self.handle(UndrainExecutor(executor_id))

    def start(self, request_id: str, executor_id: str = "e1") -> list[Action]:
        """The first token of the latest grant arrives."""
        attempt = self.attempts[request_id]
        session = self.sessions[executor_id]
        return self.handle(LeaseStarted(executor_id, session, request_id, attempt))

    def end(
        self,
        request_id: str,
        executor_id: str = "e1",
        outcome: LeaseOutcome = LeaseOutcome.COMPLETED,
        *,
        attempt: int | None = None,
        epoch: int = EPOCH,
        reason: Reason | None = None,
    ) -> list[Action]:
        """An executor's last word on a lease, the latest grant unless told otherwise."""
        attempt = self.attempts.get(request_id, 1) if attempt is None else attempt
        session = self.sessions[executor_id]
        return self.handle(
            LeaseEnded(executor_id, session, request_id, epoch, attempt, outcome, reason=reason)
        )

    def row(self, executor_id: str = "e1") -> ExecutorRow:
        """An executor's row in the snapshot."""
        rows = self.core.snapshot(self.now_ms, 0).executors
        return next(row for row in rows if row.executor_id == executor_id)

    def status(self, request_id: str) -> RequestStatus:
        """Where a live request stands."""
        status = self.core.status(request_id, self.now_ms)
        assert status is not None
        return status


def granted(sent: list[Action]) -> list[tuple[str, str]]:
    """(request, executor) of each grant, in order."""
    return [(a.request_id, a.executor_id) for a in sent if isinstance(a, LeaseGranted)]


def finished(sent: list[Action]) -> dict[str, Reason | None]:
    """Requests that finished and why."""
    return {a.request_id: a.reason for a in sent if isinstance(a, RequestFinished)}


def rejection(sent: list[Action]) -> RequestRejected:
    """The one refusal."""
    [refused] = [a for a in sent if isinstance(a, RequestRejected)]
    assert len(sent) == 1
    return refused


def of_type(sent: list[Action], kind: type[Action]) -> list[Action]:
    """Actions of one kind."""
    return [action for action in sent if isinstance(action, kind)]
