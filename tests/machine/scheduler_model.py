"""What must be true of the scheduler's core, kept in flat lists, and what its messages do.

The fake executors know what they really run: what is granted must fit into what is physically
free there, whatever the core believes.
"""

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from headway.reasons import Reason
from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.core.messages import (
    Action,
    Effects,
    Event,
    ExecutorDrained,
    ExecutorWelcomed,
    LeaseAcknowledged,
    LeaseAdopted,
    LeaseGranted,
    LeaseRevoked,
    ModelLoadOrdered,
    Request,
    RequestAdmitted,
    RequestFinished,
    SessionClosed,
)
from scheduler_svc.core.scheduler import Scheduler

EPOCH = 3
MODELS = ("A", "B", "C")
EXECUTORS = ("e0", "e1", "e2")
TENANTS = ("t0", "t1", "t2")
SETTINGS = CoreSettings(
    max_queued_requests=6,
    max_queued_tokens=400,
    max_queued_bytes=900,
    max_inflight=11,
    max_inflight_per_tenant=7,
    max_inflight_per_model=9,
    max_executors=3,
    num_bands=3,
    executor_grace_ms=500,
    revoke_timeout_ms=300,
    max_attempts=2,
    result_ttl_ms=3_000,
    aging_equalization_ms=700,
    band_min_shares=(0.0, 0.2, 0.1),
    band_max_wait_ms=(600, 900),
    tenant_weights={"t1": 2.0},
    model_hold_ms=250,
    switch_time_share=0.5,
    model_limits={"C": 2},
    load_timeout_ms=4_000,
    load_backoff_ms=100,
    load_backoff_max_ms=300,
    max_load_failures=2,
    max_sessions=3,
    max_fair_accounts=2,
    max_known_models=2,
    max_prefix_blocks=8,
)

Key = tuple[str, int, int]


@dataclass
class FakeExecutor:
    """What is really there. ``runs`` is slots by lease; an ended lease takes none."""

    session: int | None = None
    incarnation: int = 0
    num_slots: int = 0
    max_models: int = 1
    offers: tuple[str, ...] = ()
    # on the device
    models: tuple[str, ...] = ()
    # ordered and not answered
    loading: str | None = None
    is_draining: bool = False
    # the scheduler has a record of it, as far as its messages tell
    runs: dict[Key, int] = field(default_factory=dict)


@dataclass
class ModelRequest:
    """What clients know of an accepted request."""

    request: Request
    accepted_ms: int
    first_grant_ms: int | None = None
    attempt: int = 0
    end: RequestFinished | None = None
    end_ms: int = 0


class SchedulerModel(RuleBasedStateMachine):
    """The core, and beside it what clients and executors know."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Scheduler(SETTINGS, EPOCH)
        self.now_ms = 0
        self.log: list[tuple[Event, int, str]] = []
        self.num_requests = 0
        self.num_sessions = 0
        # in order of arrival
        self.requests: dict[str, ModelRequest] = {}
        self.keys: dict[tuple[str, str], str] = {}
        self.executors = {name: FakeExecutor() for name in EXECUTORS}
        self.is_closing = False

    def handle(self, event: Event) -> list[Action]:
        effects = self.core.handle(event, self.now_ms)
        self.log.append((event, self.now_ms, repr(effects)))
        self.check_persisted(effects)
        for action in effects.send:
            self.carry_out(action)
        return list(effects.send)

    def check_persisted(self, effects: Effects) -> None:
        durable = [a for a in effects.send if isinstance(a, RequestAdmitted | RequestFinished)]
        assert durable == list(effects.persist)

    def carry_out(self, action: Action) -> None:
        match action:
            case RequestAdmitted():
                request = action.request
                assert request.request_id not in self.requests
                self.requests[request.request_id] = ModelRequest(request, self.now_ms)
            case RequestFinished():
                known = self.requests[action.request_id]
                assert known.end is None
                known.end, known.end_ms = action, self.now_ms
                assert (action.retry_after_ms is not None) is (
                    action.reason in (Reason.QUEUE_TIMEOUT, Reason.NO_CAPACITY)
                )
            case LeaseGranted():
                self.carry_out_grant(action)
            case LeaseAdopted():
                self.carry_out_adopt(action)
            case LeaseRevoked():
                self.speaking_to(action.executor_id, action.session)
            case LeaseAcknowledged():
                executor = self.speaking_to(action.executor_id, action.session)
                executor.runs.pop((action.request_id, action.epoch, action.attempt), None)
            case ModelLoadOrdered():
                self.carry_out_load(action)
            case ExecutorWelcomed():
                self.speaking_to(action.executor_id, action.session)
            case ExecutorDrained():
                executor = self.speaking_to(action.executor_id, action.session)
                assert executor.is_draining
            case SessionClosed():
                executor = self.executors[action.executor_id]
                if executor.session == action.session:
                    executor.session = None

    def speaking_to(self, executor_id: str, session: int) -> FakeExecutor:
        executor = self.executors[executor_id]
        assert executor.session == session
        return executor

    def live(self, request_id: str) -> ModelRequest:
        known = self.requests[request_id]
        assert known.end is None
        return known

    def carry_out_grant(self, action: LeaseGranted) -> None:
        executor = self.speaking_to(action.executor_id, action.session)
        known = self.live(action.request_id)
        assert action.attempt == known.attempt + 1
        known.attempt = action.attempt
        if known.first_grant_ms is None:
            known.first_grant_ms = self.now_ms
            assert self.now_ms <= known.accepted_ms + known.request.queue_timeout_ms
        assert not executor.is_draining
        assert known.request.model in executor.models
        num_slots = min(known.request.num_samples, executor.num_slots)
        assert sum(executor.runs.values()) + num_slots <= executor.num_slots
        executor.runs[action.request_id, EPOCH, action.attempt] = num_slots

    def carry_out_load(self, action: ModelLoadOrdered) -> None:
        executor = self.speaking_to(action.executor_id, action.session)
        assert executor.loading is None
        assert not executor.is_draining
        assert action.model in executor.offers
        assert action.model not in executor.models
        assert set(action.evict) <= set(executor.models)
        # never over a running lease
        for (request_id, _, _), slots in executor.runs.items():
            assert not slots or self.requests[request_id].request.model not in action.evict
        executor.models = tuple(m for m in executor.models if m not in action.evict)
        assert len(executor.models) < executor.max_models
        executor.loading = action.model

    def carry_out_adopt(self, action: LeaseAdopted) -> None:
        executor = self.speaking_to(action.executor_id, action.session)
        known = self.live(action.request_id)
        held = (action.request_id, action.held_epoch, action.held_attempt)
        assert action.attempt == known.attempt + 1
        known.attempt = action.attempt
        if known.first_grant_ms is None:
            known.first_grant_ms = self.now_ms
        # of what it only said that it held it really runs one from now on
        executor.runs[action.request_id, EPOCH, action.attempt] = executor.runs.pop(held, 1)

    def waiting(self) -> list[Request]:
        """By arrival."""
        found = []
        for request_id in self.requests:
            status = self.core.status(request_id, self.now_ms)
            if status is not None and not status.is_running:
                found.append(self.requests[request_id].request)
        return found

    def any_request(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(["unknown", *list(self.requests)[-12:]]))
