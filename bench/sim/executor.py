"""A modelled executor: the attach protocol around a modelled engine.

Rule: it does what executor_svc/core/session.py does, as far as leases and models go: it keeps a
lease until its end is acknowledged, names what it holds when it attaches, drops what is not
adopted, and says ABSENT, then RESIDENT when it loads. Loads happen one at a time and do not slow
what runs. What it is told arrives in batches, one for each event that the policy handled.

Two things must never happen and stop the simulation: more leases than slots, and more models on
the device than max_models.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from bench.sim.costs import Costs
from bench.sim.engines import ENGINES, Engine, SlotEngine, whole_ms
from bench.sim.work import HeldWork, Work
from bench.sim.workload import Fleet
from scheduler_svc.core.messages import (
    Action,
    Event,
    ExecutorAttached,
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
)


class Executor:
    """One executor. ``now_ms`` of every call is the simulator's clock."""

    def __init__(
        self, number: int, fleet: Fleet, costs: Costs, models: list[str], epoch: int
    ) -> None:
        self.executor_id = f"e{number}"
        self._number = number
        self._fleet = fleet
        self._costs = costs
        self._models = models
        self._epoch = epoch
        self.session = 0
        self.is_attached = False
        self._incarnation = 0
        # while it stalls its engine's clock stands; they differ by this much
        self._stalled_ms = 0
        self.outbox: list[Event] = []
        # filled by starts, read and emptied by the world: requests whose work began
        self.started: list[str] = []
        self.num_loads = 0
        self.num_refused_loads = 0
        # grants of a model that was still on its way: the references do that, the core must not
        self.num_early_grants = 0
        self._restart()

    def _restart(self) -> None:
        self._incarnation += 1
        self._engine: Engine = ENGINES[self._fleet.engine](self._costs, self._fleet.num_slots)
        self._leases: dict[str, HeldWork] = {}
        self._num_running = 0
        first = self._number * self._fleet.max_models
        wanted = range(first, first + self._fleet.max_models)
        self.resident = {self._models[n % len(self._models)] for n in wanted}
        # resident according to the last hello
        self._told = set(self.resident)
        self._loading: deque[str] = deque()
        self._load_ends_ms: int | None = None

    # --- life -----------------------------------------------------------------------------

    def hello(self, session: int) -> ExecutorAttached:
        """Open a session; nothing is said on it before it is welcomed."""
        self.session, self.is_attached = session, False
        self.outbox.clear()
        self._told = set(self.resident)
        return ExecutorAttached(
            executor_id=self.executor_id,
            session=session,
            incarnation=f"{self.executor_id}.{self._incarnation}",
            num_slots=self._fleet.num_slots,
            max_models=self._fleet.max_models,
            models=tuple(
                ModelOffer(
                    model,
                    model in self.resident,
                    self._fleet.load_time_ms,
                    is_loading=bool(self._loading) and model == self._loading[0],
                )
                for model in self._models
            ),
            held=tuple(
                HeldLease(
                    lease.request_id,
                    lease.epoch,
                    lease.attempt,
                    lease.work.model,
                    num_slots=1,
                    has_ended=lease.has_ended,
                )
                for lease in self._leases.values()
            ),
        )

    def disconnect(self) -> None:
        """Its session is over; it goes on computing."""
        self.is_attached = False
        self.outbox.clear()

    def crash(self) -> None:
        """All is lost; whoever gets its requests does the work from the beginning."""
        self.disconnect()
        self._restart()

    def stall(self, for_ms: int) -> None:
        """Its clock stands still for so long, from now."""
        self._stalled_ms += for_ms
        if self._load_ends_ms is not None:
            self._load_ends_ms += for_ms

    def next_ms(self) -> int | None:
        """When it has something to do by itself."""
        engine_ms = self._engine.next_ms()
        due = [] if engine_ms == float("inf") else [whole_ms(engine_ms + self._stalled_ms)]
        if self._load_ends_ms is not None:
            due.append(self._load_ends_ms)
        return min(due, default=None)

    # --- work -----------------------------------------------------------------------------

    def advance(self, now_ms: int) -> None:
        """Let its engine and its loads go on until now."""
        for request_id, is_end in self._engine.advance(now_ms - self._stalled_ms + 1e-6):
            lease = self._leases[request_id]
            if is_end:
                lease.has_ended = True
                self._num_running -= 1
                self._say_ended(lease, LeaseOutcome.COMPLETED)
            else:
                lease.has_first_token = True
                self._say_first_token(lease)
        if self._load_ends_ms is not None and now_ms >= self._load_ends_ms:
            self._loaded(now_ms)

    def redraw(self, draw: Callable[[str, int], int], now_ms: int) -> None:
        """Give what runs other lengths, as ``SlotEngine.redraw`` does; for its engine only."""
        assert isinstance(self._engine, SlotEngine)
        for request_id, length in self._engine.redraw(draw, now_ms - self._stalled_ms).items():
            lease = self._leases[request_id]
            lease.work = replace(lease.work, num_output_tokens=length)

    def obey(self, actions: list[Action], now_ms: int, work_of: Callable[[str], Work]) -> None:
        """Orders arrived, all of one session and one decision."""
        if isinstance(actions[0], ExecutorWelcomed):
            self._welcome(actions, now_ms)
        for action in actions:
            match action:
                case LeaseGranted():
                    self._grant(action, work_of(action.request_id), now_ms)
                case LeaseAcknowledged():
                    lease = self._find(action.request_id, action.epoch, action.attempt)
                    if lease is not None:
                        self._drop(lease, now_ms)
                case LeaseRevoked():
                    self._revoke(action, now_ms)
                case ModelLoadOrdered():
                    self._order_load(action, now_ms)
                case _:
                    pass

    def _welcome(self, actions: list[Action], now_ms: int) -> None:
        self.is_attached = True
        for model in sorted(self.resident ^ self._told):
            self._say_model(model, self._fleet.load_time_ms)
        wanted = {action.request_id for action in actions if isinstance(action, LeaseRevoked)}
        for action in actions:
            if not isinstance(action, LeaseAdopted):
                continue
            lease = self._find(action.request_id, action.held_epoch, action.held_attempt)
            if lease is None:
                self._say_unknown(action.request_id, self._epoch, action.attempt)
                continue
            wanted.add(action.request_id)
            lease.epoch, lease.attempt = self._epoch, action.attempt
            if lease.has_first_token:
                self._say_first_token(lease)
            if lease.has_ended:
                self._say_ended(lease, LeaseOutcome.COMPLETED)
        for lease in list(self._leases.values()):
            if lease.request_id not in wanted:
                self._drop(lease, now_ms)

    def _grant(self, action: LeaseGranted, work: Work, now_ms: int) -> None:
        old = self._leases.get(action.request_id)
        if old is not None:
            self._drop(old, now_ms)
        lease = HeldWork(action.request_id, self._epoch, action.attempt, work)
        if work.model not in self.resident and work.model not in self._loading:
            self._say_ended(lease, LeaseOutcome.RETURNED)
            self._say_model(work.model, None)
            return
        self._leases[action.request_id] = lease
        self._num_running += 1
        assert self._num_running <= self._fleet.num_slots, "more leases than slots"
        if work.model in self.resident:
            self._start(lease, now_ms)
        else:
            self.num_early_grants += 1

    def _start(self, lease: HeldWork, now_ms: int) -> None:
        lease.has_started = True
        self.started.append(lease.request_id)
        work, clock = lease.work, now_ms - self._stalled_ms
        self._engine.advance(clock)
        self._engine.start(lease.request_id, work.num_prompt_tokens, work.num_output_tokens, clock)

    def _revoke(self, action: LeaseRevoked, now_ms: int) -> None:
        lease = self._find(action.request_id, action.epoch, action.attempt)
        if lease is None:
            self._say_unknown(action.request_id, action.epoch, action.attempt)
        elif not lease.has_ended:
            self._drop(lease, now_ms)
            self._say_ended(lease, LeaseOutcome.REVOKED)

    def _drop(self, lease: HeldWork, now_ms: int) -> None:
        """Forget a lease; what runs is stopped."""
        del self._leases[lease.request_id]
        if not lease.has_ended:
            self._num_running -= 1
            if lease.has_started:
                self._engine.stop(lease.request_id, now_ms - self._stalled_ms)

    def _find(self, request_id: str, epoch: int, attempt: int) -> HeldWork | None:
        lease = self._leases.get(request_id)
        if lease is None or (lease.epoch, lease.attempt) != (epoch, attempt):
            return None
        return lease

    # --- models ---------------------------------------------------------------------------

    def _order_load(self, action: ModelLoadOrdered, now_ms: int) -> None:
        model = action.model
        if model in self._loading:
            return
        if model in self.resident:
            self._say_model(model, None)
            return
        busy = {lease.work.model for lease in self._leases.values() if not lease.has_ended}
        left = self.resident - set(action.evict)
        if busy & set(action.evict) or len(left) + len(self._loading) >= self._fleet.max_models:
            self.num_refused_loads += 1
            self._say(
                ModelChanged(self.executor_id, self.session, model, ModelState.FAILED, None, "full")
            )
            return
        evicted = sorted(self.resident & set(action.evict))
        self.resident = left
        for name in evicted:
            self._say_model(name, None)
        self._loading.append(model)
        if self._load_ends_ms is None:
            self._load_ends_ms = now_ms + self._fleet.load_time_ms

    def _loaded(self, now_ms: int) -> None:
        model = self._loading.popleft()
        self.resident.add(model)
        assert len(self.resident) + len(self._loading) <= self._fleet.max_models
        self.num_loads += 1
        self._say_model(model, self._fleet.load_time_ms)
        self._load_ends_ms = now_ms + self._fleet.load_time_ms if self._loading else None
        for lease in self._leases.values():
            if lease.work.model == model and not lease.has_started:
                self._start(lease, now_ms)

    # --- words ----------------------------------------------------------------------------

    def _say(self, event: Event) -> None:
        if self.is_attached:
            self.outbox.append(event)

    def _say_model(self, model: str, load_ms: int | None) -> None:
        is_resident = model in self.resident
        state = ModelState.RESIDENT if is_resident else ModelState.ABSENT
        self._say(
            ModelChanged(
                self.executor_id, self.session, model, state, load_ms if is_resident else None
            )
        )

    def _say_first_token(self, lease: HeldWork) -> None:
        self._say(LeaseStarted(self.executor_id, self.session, lease.request_id, lease.attempt))

    def _say_ended(self, lease: HeldWork, outcome: LeaseOutcome) -> None:
        self._say(
            LeaseEnded(
                executor_id=self.executor_id,
                session=self.session,
                request_id=lease.request_id,
                epoch=lease.epoch,
                attempt=lease.attempt,
                outcome=outcome,
                num_generated_tokens=(
                    lease.work.num_output_tokens if outcome is LeaseOutcome.COMPLETED else 0
                ),
            )
        )

    def _say_unknown(self, request_id: str, epoch: int, attempt: int) -> None:
        self._say(
            LeaseEnded(
                self.executor_id, self.session, request_id, epoch, attempt, LeaseOutcome.UNKNOWN
            )
        )
