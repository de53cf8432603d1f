"""What executors do to the scheduler's core, honest and hostile ones, and what they are told."""

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from headway.reasons import Reason
from scheduler_svc.core.messages import (
    Action,
    DrainExecutor,
    ExecutorAttached,
    ExecutorCapacityChanged,
    ExecutorDisconnected,
    ExecutorWelcomed,
    HeldLease,
    LeaseAcknowledged,
    LeaseAdopted,
    LeaseEnded,
    LeaseOutcome,
    LeaseRevoked,
    LeaseStarted,
    ModelChanged,
    ModelOffer,
    ModelState,
    RequestFinished,
    UndrainExecutor,
)
from tests.machine.scheduler_model import (
    EPOCH,
    EXECUTORS,
    MODELS,
    FakeExecutor,
    Key,
    SchedulerModel,
)


class ExecutorRules(SchedulerModel):
    """They come, lie about what they hold, change, lose models, end leases twice, and go."""

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
            executor.loading = None
            executor.runs.clear()
            executor.is_draining = False
        rows = {row.executor_id for row in self.core.snapshot(self.now_ms, 0).executors}
        if name not in rows:
            executor.is_draining = False  # its record, and with it the order, is gone
        is_forgetful: bool = data.draw(st.booleans())
        if executor.runs and is_forgetful:
            for key in data.draw(st.sets(st.sampled_from(sorted(executor.runs)))):
                del executor.runs[key]
        held = [self.held(key, slots) for key, slots in executor.runs.items()]
        if data.draw(st.integers(0, 3)) == 0:
            held.append(self.lie(executor, data))
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
        executor.max_models = max_models
        executor.models = tuple(sorted(models - cold))
        executor.offers = tuple(sorted(models | cold))
        if executor.loading not in cold or len(executor.models) >= max_models:
            executor.loading = None
        offers = tuple(
            ModelOffer(
                model,
                model not in cold,
                50 if model == "A" else None,
                is_loading=model == executor.loading,
            )
            for model in executor.offers
        )
        incarnation = str(executor.incarnation)
        sent = self.handle(
            ExecutorAttached(
                name, executor.session, incarnation, num_slots, max_models, offers, tuple(held)
            )
        )
        self.check_reconciled(sent, held, lies)

    def held(self, key: Key, slots: int) -> HeldLease:
        """The truth."""
        model = self.requests[key[0]].request.model
        return HeldLease(*key, model, max(1, slots), has_ended=not slots)

    def lie(self, executor: FakeExecutor, data: st.DataObject) -> HeldLease:
        """Of any lease; of one that it runs, that it may have ended."""
        epoch = data.draw(st.sampled_from((1, EPOCH)))
        key = self.any_request(data), epoch, data.draw(st.integers(1, 4))
        model, slots = data.draw(st.sampled_from(MODELS)), data.draw(st.integers(1, 5))
        if key in executor.runs:
            truth = self.held(key, executor.runs[key])
            model, slots = truth.model, truth.num_slots
        return HeldLease(*key, model, slots, data.draw(st.booleans()))

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
            session, executor.session = executor.session, None
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

    def any_lease(self, data: st.DataObject) -> tuple[str, Key]:
        """One that an executor really has, or any other."""
        name = data.draw(st.sampled_from(EXECUTORS))
        runs = sorted(self.executors[name].runs)
        is_honest: bool = data.draw(st.sampled_from((True, True, True, False)))
        if runs and is_honest:
            return name, data.draw(st.sampled_from(runs))
        epoch = data.draw(st.sampled_from((1, EPOCH)))
        return name, (self.any_request(data), epoch, data.draw(st.integers(0, 4)))

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
