"""The scheduler's core against a simple model, under any order of events, hostile ones included.

The model keeps flat lists and knows what the fake executors really run: what is granted must fit
into what is physically free there, whatever the core believes.
"""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headway.reasons import Reason
from scheduler_svc.core.domain import CoreSettings, RequestRecord
from scheduler_svc.core.messages import (
    Action,
    Cancel,
    CloseDoor,
    DrainExecutor,
    Effects,
    Event,
    ExecutorAttached,
    ExecutorCapacityChanged,
    ExecutorDisconnected,
    ExecutorDrained,
    ExecutorRow,
    ExecutorWelcomed,
    HeldLease,
    LeaseAcknowledged,
    LeaseAdopted,
    LeaseEnded,
    LeaseGranted,
    LeaseOutcome,
    LeaseRevoked,
    LeaseStarted,
    ModelChanged,
    ModelLoadOrdered,
    ModelOffer,
    ModelState,
    Request,
    RequestAdmitted,
    RequestDeduplicated,
    RequestFinished,
    RequestRejected,
    SessionClosed,
    Submit,
    Tick,
    UndrainExecutor,
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


class SchedulerMachine(RuleBasedStateMachine):
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

    # --- carrying out ------------------------------------------------------------------

    def handle(self, event: Event) -> list[Action]:
        effects = self.core.handle(event, self.now_ms)
        self.log.append((event, self.now_ms, repr(effects)))
        self.check_persisted(effects)
        for action in effects.send:
            self.carry_out(action, event)
        return list(effects.send)

    def check_persisted(self, effects: Effects) -> None:
        durable = [a for a in effects.send if isinstance(a, RequestAdmitted | RequestFinished)]
        assert durable == list(effects.persist)

    def carry_out(self, action: Action, event: Event) -> None:
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
                executor = self.speaking_to(action.executor_id, action.session)
                key = (action.request_id, action.epoch, action.attempt)
                if key in executor.runs and isinstance(event, ExecutorAttached):
                    executor.runs[key] = min(1, executor.runs[key])
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
                    executor.session = executor.loading = None

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
        # never over a running lease, nor over one that may be of any model
        for (request_id, _, _), slots in executor.runs.items():
            known = self.requests.get(request_id)
            assert not slots or not action.evict or known is not None
            assert not slots or known is None or known.request.model not in action.evict
        executor.models = tuple(m for m in executor.models if m not in action.evict)
        assert len(executor.models) < executor.max_models
        executor.loading = action.model

    def carry_out_adopt(self, action: LeaseAdopted) -> None:
        executor = self.speaking_to(action.executor_id, action.session)
        known = self.live(action.request_id)
        held = (action.request_id, action.held_epoch, action.held_attempt)
        is_current = held[1:] == (EPOCH, known.attempt)
        assert action.attempt == known.attempt + 1
        known.attempt = action.attempt
        if known.first_grant_ms is None:
            known.first_grant_ms = self.now_ms
        num_slots = min(known.request.num_samples, max(1, executor.num_slots))
        was = executor.runs.pop(held, num_slots)
        if is_current or not was:
            num_slots = min(was, max(1, executor.num_slots))
        executor.runs[action.request_id, EPOCH, action.attempt] = num_slots

    # --- clients -----------------------------------------------------------------------

    @rule(
        tenant=st.sampled_from(TENANTS),
        model=st.sampled_from((*MODELS, *MODELS, "unheard of")),
        band=st.sampled_from((2, 1, 0, 1, 2, 3)),
        num_samples=st.sampled_from((1, 1, 2, 5)),
        num_bytes=st.integers(1, 300),
        queue_timeout_ms=st.sampled_from((5_000, 2_000, 200, 0)),
        execution_timeout_ms=st.sampled_from((4_000, 400)),
        session_id=st.sampled_from(("", "s0", "s1")),
        num_blocks=st.integers(0, 3),
        key=st.sampled_from(("", "", "", "k0", "k1")),
        body_hash=st.sampled_from((b"0", b"0", b"1")),
    )
    def submit(
        self,
        tenant: str,
        model: str,
        band: int,
        num_samples: int,
        num_bytes: int,
        queue_timeout_ms: int,
        execution_timeout_ms: int,
        session_id: str,
        num_blocks: int,
        key: str,
        body_hash: bytes,
    ) -> None:
        self.num_requests += 1
        request = Request(
            request_id=f"r{self.num_requests}",
            tenant=tenant,
            model=model,
            band=band,
            num_prompt_tokens=20,
            max_tokens=10,
            num_samples=num_samples,
            num_bytes=num_bytes,
            queue_timeout_ms=queue_timeout_ms,
            execution_timeout_ms=execution_timeout_ms,
            session_id=session_id,
            prefix_hashes=tuple(range(num_blocks)),
            idempotency_key=key,
            body_hash=body_hash,
        )
        earlier = self.find_key(request)
        allowed = self.is_allowed(request)
        answers = [
            action
            for action in self.handle(Submit(request))
            if isinstance(action, RequestAdmitted | RequestDeduplicated | RequestRejected)
        ]
        assert len(answers) == 1
        match answers[0]:
            case RequestDeduplicated(original_id=original_id):
                assert earlier is not None
                assert original_id == earlier.request.request_id
                assert earlier.request.body_hash == body_hash
            case RequestRejected(reason=Reason.REQUEST_ID_CONFLICT):
                assert earlier is not None
                assert earlier.request.body_hash != body_hash
            case RequestRejected(reason=Reason.DEADLINE_UNREACHABLE):
                assert earlier is None
                assert self.waiting()
            case RequestRejected():
                assert earlier is None
                assert not allowed
            case RequestAdmitted():
                assert earlier is None
                assert allowed
                if key:
                    self.keys[tenant, key] = request.request_id

    @rule(
        tenant=st.sampled_from(TENANTS),
        bands=st.lists(st.integers(0, 2), min_size=2, max_size=7),
        model=st.sampled_from(MODELS),
        num_samples=st.sampled_from((1, 1, 2, 3)),
    )
    def submit_burst(self, tenant: str, bands: list[int], model: str, num_samples: int) -> None:
        """Plain requests, so that there is a queue."""
        for band in bands:
            self.submit(tenant, model, band, num_samples, 50, 3_000, 3_000, "", 0, "", b"")

    def find_key(self, request: Request) -> ModelRequest | None:
        original_id = self.keys.get((request.tenant, request.idempotency_key))
        if original_id is None:
            return None
        known = self.requests[original_id]
        is_kept = known.end is None or self.now_ms < known.end_ms + SETTINGS.result_ttl_ms
        return known if is_kept else None

    def is_allowed(self, request: Request) -> bool:
        live = [known.request for known in self.requests.values() if known.end is None]
        waiting = self.waiting()
        rows = self.core.snapshot(self.now_ms, 0).executors
        return (
            request.band < SETTINGS.num_bands
            and not self.is_closing
            and any(
                request.model in self.executors[r.executor_id].offers and r.state != "draining"
                for r in rows
                if not self.executors[r.executor_id].is_draining
            )
            and len(live) < SETTINGS.max_inflight
            and sum(r.tenant == request.tenant for r in live) < SETTINGS.max_inflight_per_tenant
            and sum(r.model == request.model for r in live) < SETTINGS.max_inflight_per_model
            and len(waiting) < SETTINGS.max_queued_requests
            and sum(r.num_tokens for r in [*waiting, request]) <= SETTINGS.max_queued_tokens
            and sum(r.num_bytes for r in [*waiting, request]) <= SETTINGS.max_queued_bytes
        )

    @rule(data=st.data(), is_foreign=st.sampled_from((False, False, False, True)))
    def cancel(self, data: st.DataObject, is_foreign: bool) -> None:
        request_id = self.any_request(data)
        known = self.requests.get(request_id)
        is_owner = known is not None and not is_foreign
        tenant = known.request.tenant if known is not None and is_owner else "stranger"
        was_live = known is not None and known.end is None
        self.handle(Cancel(request_id, tenant))
        if known is not None and was_live:
            assert (known.end is not None) is is_owner

    @precondition(lambda self: len(self.log) > 150)
    @rule()
    def close_door(self) -> None:
        self.is_closing = True
        self.handle(CloseDoor())

    # --- executors ---------------------------------------------------------------------

    @initialize(num_slots=st.integers(1, 4))
    def attach_two(self, num_slots: int) -> None:
        """An honest fleet to begin with."""
        for name, models in (("e0", ("A", "B")), ("e1", ("B", "C"))):
            self.open_session(name, num_slots, 2, set(models), set(), [])

    @rule(
        name=st.sampled_from(EXECUTORS),
        is_new_process=st.sampled_from((False, False, False, True)),
        num_slots=st.sampled_from((2, 1, 3, 4, 0)),
        max_models=st.sampled_from((1, 1, 2, 3)),
        models=st.sets(st.sampled_from(MODELS), min_size=2),
        cold=st.sets(st.sampled_from(MODELS), max_size=2),
        data=st.data(),
    )
    def attach(
        self,
        name: str,
        is_new_process: bool,
        num_slots: int,
        max_models: int,
        models: set[str],
        cold: set[str],
        data: st.DataObject,
    ) -> None:
        executor = self.executors[name]
        if is_new_process:
            executor.incarnation += 1
            executor.runs.clear()
            executor.is_draining = False
        rows = {row.executor_id for row in self.core.snapshot(self.now_ms, 0).executors}
        if name not in rows:
            executor.is_draining = False  # its record, and with it the order, is gone
        is_forgetful: bool = data.draw(st.booleans())
        if executor.runs and is_forgetful:
            for key in data.draw(st.sets(st.sampled_from(sorted(executor.runs)))):
                del executor.runs[key]
        held = [HeldLease(*key, has_ended=not slots) for key, slots in executor.runs.items()]
        if data.draw(st.integers(0, 3)) == 0:
            held.append(self.lie(data))
        self.open_session(name, num_slots, max_models, models, cold, held)

    def open_session(
        self,
        name: str,
        num_slots: int,
        max_models: int,
        models: set[str],
        cold: set[str],
        held: list[HeldLease],
    ) -> None:
        executor = self.executors[name]
        lies = {
            (lease.request_id, lease.epoch, lease.attempt)
            for lease in held
            if lease.request_id in self.requests
            and self.requests[lease.request_id].end is None
            and lease.epoch == EPOCH
            and lease.attempt > self.requests[lease.request_id].attempt
        }
        self.num_sessions += 1
        executor.session, executor.num_slots = self.num_sessions, num_slots
        executor.max_models, executor.loading = max_models, None
        executor.models = tuple(sorted(models - cold))
        executor.offers = tuple(sorted(models | cold))
        offers = tuple(
            ModelOffer(model, model not in cold, 50 if model == "A" else None)
            for model in executor.offers
        )
        incarnation = str(executor.incarnation)
        sent = self.handle(
            ExecutorAttached(
                name, executor.session, incarnation, num_slots, max_models, offers, tuple(held)
            )
        )
        self.check_reconciled(sent, held, lies)

    def lie(self, data: st.DataObject) -> HeldLease:
        epoch = data.draw(st.sampled_from((1, EPOCH)))
        return HeldLease(
            self.any_request(data), epoch, data.draw(st.integers(1, 4)), data.draw(st.booleans())
        )

    def check_reconciled(self, sent: list[Action], held: list[HeldLease], lies: set[Key]) -> None:
        """Welcome comes first, then one answer for each lease that was listed, unless it is
        of an attempt that was never made."""
        welcome = next(i for i, a in enumerate(sent) if isinstance(a, ExecutorWelcomed))
        kinds = LeaseAdopted | LeaseAcknowledged | LeaseRevoked
        assert not any(isinstance(action, kinds) for action in sent[:welcome])
        answers = []
        for action in sent[welcome:]:
            if isinstance(action, LeaseAdopted):
                answers.append((action.request_id, action.held_epoch, action.held_attempt))
            elif isinstance(action, LeaseAcknowledged | LeaseRevoked):
                answers.append((action.request_id, action.epoch, action.attempt))
        listed = {(lease.request_id, lease.epoch, lease.attempt) for lease in held} - lies
        assert Counter(answers) == Counter(listed)

    @rule(name=st.sampled_from(EXECUTORS), is_stale=st.sampled_from((False, False, False, True)))
    def disconnect(self, name: str, is_stale: bool) -> None:
        executor = self.executors[name]
        if executor.session is None or is_stale:
            assert self.handle(ExecutorDisconnected(name, 0)) == []
        else:
            session, executor.session, executor.loading = executor.session, None, None
            self.handle(ExecutorDisconnected(name, session))

    @rule(
        name=st.sampled_from(EXECUTORS),
        num_slots=st.integers(0, 4),
        max_models=st.sampled_from((1, 2, 2, 3)),
        is_stale=st.sampled_from((False, False, False, True)),
    )
    def resize(self, name: str, num_slots: int, max_models: int, is_stale: bool) -> None:
        executor = self.executors[name]
        if executor.session is None or is_stale:
            assert self.handle(ExecutorCapacityChanged(name, 0, num_slots, max_models)) == []
        else:
            executor.num_slots, executor.max_models = num_slots, max_models
            self.handle(ExecutorCapacityChanged(name, executor.session, num_slots, max_models))

    @rule(name=st.sampled_from(EXECUTORS), is_draining=st.sampled_from((False, False, True)))
    def drain(self, name: str, is_draining: bool) -> None:
        rows = {row.executor_id for row in self.core.snapshot(self.now_ms, 0).executors}
        if name in rows:
            self.executors[name].is_draining = is_draining
        self.handle(DrainExecutor(name) if is_draining else UndrainExecutor(name))

    @rule(
        name=st.sampled_from(EXECUTORS),
        state=st.sampled_from((ModelState.RESIDENT, ModelState.RESIDENT, ModelState.FAILED)),
        load_ms=st.sampled_from((None, 20, 200)),
    )
    def end_load(self, name: str, state: ModelState, load_ms: int | None) -> None:
        """Of this executor, or of another that is loading."""
        names = [name, *EXECUTORS]
        name = next((n for n in names if self.executors[n].loading is not None), name)
        executor = self.executors[name]
        if executor.session is not None and executor.loading is not None:
            model, executor.loading = executor.loading, None
            if state is ModelState.RESIDENT and model not in executor.models:
                executor.models = (*executor.models, model)
            self.handle(ModelChanged(name, executor.session, model, state, load_ms))

    @rule(name=st.sampled_from(EXECUTORS), model=st.sampled_from((*MODELS, "unheard of")))
    def lose_model(self, name: str, model: str) -> None:
        """By itself: nothing of it runs there."""
        executor = self.executors[name]
        runs = {r for (r, _, _), slots in executor.runs.items() if slots}
        if executor.session is None or executor.loading == model or runs:
            return
        executor.models = tuple(other for other in executor.models if other != model)
        self.handle(ModelChanged(name, executor.session, model, ModelState.ABSENT))

    @rule(data=st.data())
    def start_lease(self, data: st.DataObject) -> None:
        name, (request_id, _, attempt) = self.any_lease(data)
        session = self.executors[name].session or 0
        self.handle(LeaseStarted(name, session, request_id, attempt))

    @rule(data=st.data(), outcome=st.sampled_from(LeaseOutcome), is_repeated=st.booleans())
    def end_lease(self, data: st.DataObject, outcome: LeaseOutcome, is_repeated: bool) -> None:
        name, key = self.any_lease(data)
        executor = self.executors[name]
        if executor.session is None:
            if key in executor.runs:
                executor.runs[key] = 0  # said again when it attaches
            return
        self.say_ended(name, key, outcome)
        if is_repeated and executor.session is not None:
            self.say_ended(name, key, outcome)

    @rule(data=st.data())
    def complete_lease(self, data: st.DataObject) -> None:
        """Honest progress, so that runs get further than faults alone let them."""
        running = [
            (name, key)
            for name, executor in self.executors.items()
            if executor.session is not None
            for key in executor.runs
        ]
        if running:
            name, key = data.draw(st.sampled_from(sorted(running)))
            self.say_ended(name, key, LeaseOutcome.COMPLETED)

    def say_ended(self, name: str, key: Key, outcome: LeaseOutcome) -> None:
        session = self.executors[name].session
        assert session is not None
        request_id, epoch, attempt = key
        current = self.core.current_lease(request_id)
        is_current = epoch == EPOCH and current == (name, session, attempt)
        if is_current:
            assert self.requests[request_id].attempt == attempt
        sent = self.handle(
            LeaseEnded(name, session, *key, outcome, reason=Reason.NO_CAPACITY, message="m")
        )
        ends = [a for a in sent if isinstance(a, RequestFinished) and a.request_id == request_id]
        if not is_current:
            assert ends == [] or ends[0].reason in (Reason.QUEUE_TIMEOUT, Reason.EXECUTION_TIMEOUT)
        elif outcome in (LeaseOutcome.COMPLETED, LeaseOutcome.FAILED):
            is_failed = outcome is LeaseOutcome.FAILED
            assert [end.reason for end in ends] == [Reason.NO_CAPACITY if is_failed else None]
        assert sent.count(LeaseAcknowledged(name, session, *key)) == 1

    # --- time --------------------------------------------------------------------------

    @rule(ms=st.integers(1, 400))
    def let_time_pass(self, ms: int) -> None:
        """Without a Tick: the shell is late."""
        self.now_ms += ms

    @rule()
    def tick(self) -> None:
        self.handle(Tick())
        due_ms = self.core.next_deadline_ms()
        assert due_ms is None or due_ms > self.now_ms
        for known in self.requests.values():
            if known.end is None and known.first_grant_ms is None:
                assert self.now_ms < known.accepted_ms + known.request.queue_timeout_ms
            elif known.end is None and known.first_grant_ms is not None:
                assert self.now_ms < known.first_grant_ms + known.request.execution_timeout_ms

    @rule()
    def tick_at_next_deadline(self) -> None:
        due_ms = self.core.next_deadline_ms()
        if due_ms is not None:
            self.now_ms = max(self.now_ms, due_ms)
            self.tick()

    # --- drawing -----------------------------------------------------------------------

    def any_request(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(["unknown", *list(self.requests)[-12:]]))

    def any_lease(self, data: st.DataObject) -> tuple[str, Key]:
        """One that an executor really has, or any other."""
        name = data.draw(st.sampled_from(EXECUTORS))
        runs = sorted(self.executors[name].runs)
        is_honest: bool = data.draw(st.sampled_from((True, True, True, False)))
        if runs and is_honest:
            return name, data.draw(st.sampled_from(runs))
        epoch = data.draw(st.sampled_from((1, EPOCH)))
        return name, (self.any_request(data), epoch, data.draw(st.integers(0, 4)))

    # --- what must hold ----------------------------------------------------------------

    def waiting(self) -> list[Request]:
        """By arrival."""
        found = []
        for request_id in self.requests:
            status = self.core.status(request_id, self.now_ms)
            if status is not None and not status.is_running:
                found.append(self.requests[request_id].request)
        return found

    @invariant()
    def agrees_with_itself(self) -> None:
        self.core.check_invariants()

    @invariant()
    def live_requests_are_in_one_place(self) -> None:
        num_live = 0
        for request_id, known in self.requests.items():
            status = self.core.status(request_id, self.now_ms)
            assert self.core.is_live(request_id) is (known.end is None) is (status is not None)
            num_live += known.end is None
            lease = self.core.current_lease(request_id)
            if lease is not None:
                name, session, attempt = lease
                assert status is not None
                assert status.is_running
                assert self.executors[name].session == session
                assert attempt == known.attempt
        assert self.core.num_waiting + self.core.num_running == num_live
        assert self.core.num_waiting == len(self.waiting())

    @invariant()
    def positions_are_true(self) -> None:
        for request in self.waiting():
            pool = self.pool(request.model)
            place = self.order_in_flow(request.band, request.model)
            index = [record.request for record in place].index(request)
            last = max(record.arrival for record in place[: index + 1])
            turn = (last - self.bonus(request.model), last)
            before = index
            for record in self.core._state.requests:
                other = record.request
                if record.lease is None and other.model in pool:
                    is_of_flow = (other.band, other.model) == (request.band, request.model)
                    before += other.band < request.band or (
                        other.band == request.band
                        and not is_of_flow
                        and (record.arrival - self.bonus(other.model), record.arrival) < turn
                    )
            status = self.core.status(request.request_id, self.now_ms)
            assert status is not None
            assert status.position == before
            assert status.depth == sum(other.model in pool for other in self.waiting())

    def pool(self, model: str) -> set[str]:
        """The models on its homes; without a home itself alone."""
        rows = self.core.snapshot(self.now_ms, 0).executors
        serving = [row for row in rows if row.state == "attached" and row.num_slots]
        homes = [
            row
            for row in serving
            if model in row.resident_models and not self.is_reserved(row, model)
        ]
        return {model}.union(*(row.resident_models for row in homes))

    def is_reserved(self, row: ExecutorRow, model: str) -> bool:
        """All of it for another model."""
        reservation = self.core._state.fleet.executors[row.executor_id].reservation
        return (
            reservation is not None
            and reservation.model != model
            and reservation.num_kept >= row.num_slots
        )

    def bonus(self, model: str) -> int:
        """What its warmth is worth, in arrivals."""
        rows = self.core.snapshot(self.now_ms, 0).executors
        serving = [row for row in rows if row.state == "attached" and row.num_slots]
        warm = any(
            model in row.resident_models and not self.is_reserved(row, model) for row in serving
        )
        loading = any(row.loading_model == model for row in serving)
        return SETTINGS.aging_equalization_ms * (1_024 if warm else 512 if loading else 0)

    def order_in_flow(self, band: int, model: str) -> list[RequestRecord]:
        """Those that came back, then by the virtual time that each would start at."""
        state = self.core._state
        records = [
            record
            for record in sorted(state.requests, key=lambda record: record.arrival)
            if record.lease is None and (record.request.band, record.request.model) == (band, model)
        ]
        starts: dict[int, float] = {}
        costs: Counter[str] = Counter()
        for record in records:
            tenant = record.request.tenant
            if not record.is_returned:
                weight = SETTINGS.tenant_weights.get(tenant, 1.0)
                key = state.queue.fairness.key((band, model), tenant)
                starts[record.arrival] = key + costs[tenant] / weight
                costs[tenant] += state.queue.cost(record.request)
        return sorted(
            records,
            key=lambda r: (not r.is_returned, starts.get(r.arrival, 0), r.arrival),
        )

    @invariant()
    def snapshot_is_in_grant_order(self) -> None:
        expected: list[str] = []
        for band in range(SETTINGS.num_bands):
            flows = {model: self.order_in_flow(band, model) for model in MODELS}
            while any(flows.values()):
                heads = [
                    (f[0].arrival - self.bonus(m), f[0].arrival, m) for m, f in flows.items() if f
                ]
                expected.append(flows[min(heads)[2]].pop(0).request.request_id)
        rows = self.core.snapshot(self.now_ms, 4).queue
        assert [row.request_id for row in rows] == expected[:4]

    def teardown(self) -> None:
        """Everything ends, once, and the same events give the same effects."""
        for name, executor in self.executors.items():
            for key in sorted(executor.runs):
                if executor.session is not None and key in executor.runs:
                    self.say_ended(name, key, LeaseOutcome.COMPLETED)
        for name in EXECUTORS:
            self.disconnect(name, is_stale=False)
        while self.core.next_deadline_ms() is not None:
            self.tick_at_next_deadline()
        assert all(known.end is not None for known in self.requests.values())
        self.core.check_invariants()
        assert self.core.num_waiting == self.core.num_running == 0
        assert self.core.snapshot(self.now_ms, 1).executors == ()
        again = Scheduler(SETTINGS, EPOCH)
        for event, now_ms, effects in self.log:
            assert repr(again.handle(event, now_ms)) == effects


SchedulerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestSchedulerMachine = SchedulerMachine.TestCase
