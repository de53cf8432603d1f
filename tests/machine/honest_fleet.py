"""A core with executors that keep their word and clients that never let up, on a virtual clock.

An executor loads what it is told in ``LOAD_MS`` and ends every lease in its time, so that bounds on
waiting can be computed; it may also crash, fail loads, or leave. A stream of a client keeps so many
requests waiting, whatever is granted, ends or times out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.core.messages import (
    Action,
    Event,
    ExecutorAttached,
    LeaseEnded,
    LeaseGranted,
    LeaseOutcome,
    LeaseRevoked,
    ModelChanged,
    ModelLoadOrdered,
    ModelOffer,
    ModelState,
    Request,
    RequestAdmitted,
    RequestFinished,
    SessionClosed,
    Submit,
    Tick,
)
from scheduler_svc.core.scheduler import Scheduler

EPOCH = 1
LOAD_MS = 100
NUM_PROMPT = 10
MAX_TOKENS = 5
FOREVER_MS = 10**9


@dataclass
class Lease:
    """What runs: ends at ``ends_ms`` with ``num_tokens`` generated."""

    request: Request
    attempt: int
    ends_ms: int
    num_tokens: int


@dataclass
class Executor:
    """One process; ``session`` is None while it is away."""

    name: str
    num_slots: int = 0
    max_models: int = 1
    offers: frozenset[str] = frozenset()
    session: int | None = None
    incarnation: int = 0
    models: set[str] = field(default_factory=set)
    loading: tuple[str, int] | None = None
    leases: dict[str, Lease] = field(default_factory=dict)
    num_loads_to_fail: int = 0
    is_draining: bool = False

    @property
    def next_ms(self) -> int:
        """When it has something to say."""
        if self.session is None:
            return FOREVER_MS
        ends = [lease.ends_ms for lease in self.leases.values()]
        return min([*ends, self.loading[1] if self.loading else FOREVER_MS])


@dataclass(frozen=True)
class Stream:
    """A client that keeps ``depth`` requests waiting; each runs ``lease_ms``, of all that it asked
    for it generates ``num_tokens``."""

    tenant: str
    model: str
    band: int
    depth: int
    lease_ms: int
    num_tokens: int
    session_id: str = ""
    queue_timeout_ms: int = FOREVER_MS


@dataclass
class Client:
    """What is known of an accepted request that has not ended."""

    request: Request
    stream: Stream
    accepted_ms: int
    was_granted: bool = False


class World:
    """Carries out what the core sends. ``heard`` is told of each event and what it led to."""

    def __init__(self, settings: CoreSettings, heard: Callable[[Event, list[Action]], None]):
        self.core = Scheduler(settings, EPOCH)
        self.now_ms = 0
        self.executors: dict[str, Executor] = {}
        self.streams: dict[tuple[str, str, int], Stream] = {}
        # live ones by arrival
        self.clients: dict[str, Client] = {}
        self._heard = heard
        self._num_requests = 0
        self._num_sessions = 0

    # --- time ---------------------------------------------------------------------------

    def run(self, ms: int) -> None:
        """Everything that happens by itself in so long."""
        end_ms = self.now_ms + ms
        self.top_up()
        while True:
            due_ms = self.core.next_deadline_ms()
            executor = min(self.executors.values(), key=lambda e: (e.next_ms, e.name))
            tick_ms = FOREVER_MS if due_ms is None else max(due_ms, self.now_ms)
            next_ms = min(executor.next_ms, tick_ms)
            if next_ms > end_ms:
                break
            self.now_ms = next_ms
            if executor.next_ms == next_ms:
                self._act(executor)
            else:
                self.handle(Tick())
            self.top_up()
        self.now_ms = end_ms
        self.handle(Tick())

    def handle(self, event: Event) -> None:
        """The core decides; what it sends is done."""
        sent = list(self.core.handle(event, self.now_ms).send)
        for action in sent:
            self._obey(action)
        self._heard(event, sent)

    def _obey(self, action: Action) -> None:
        match action:
            case LeaseGranted():
                self._start(action)
            case RequestFinished():
                del self.clients[action.request_id]
            case LeaseRevoked():
                lease = self.executors[action.executor_id].leases.get(action.request_id)
                if lease is not None and lease.attempt == action.attempt:
                    lease.ends_ms = self.now_ms
            case ModelLoadOrdered():
                executor = self.executors[action.executor_id]
                executor.models -= set(action.evict)
                executor.loading = action.model, self.now_ms + LOAD_MS
            case SessionClosed():
                raise AssertionError("honest executors are not cut")
            case _:
                pass

    def _start(self, action: LeaseGranted) -> None:
        client = self.clients[action.request_id]
        stream, executor = client.stream, self.executors[action.executor_id]
        client.was_granted = True
        assert client.request.model in executor.models
        executor.leases[action.request_id] = Lease(
            client.request, action.attempt, self.now_ms + stream.lease_ms, stream.num_tokens
        )
        assert len(executor.leases) <= executor.num_slots

    def _act(self, executor: Executor) -> None:
        session = executor.session
        assert session is not None
        if executor.loading is not None and executor.loading[1] <= self.now_ms:
            model, executor.loading = executor.loading[0], None
            state = ModelState.FAILED if executor.num_loads_to_fail else ModelState.RESIDENT
            executor.num_loads_to_fail = max(0, executor.num_loads_to_fail - 1)
            if state is ModelState.RESIDENT:
                executor.models.add(model)
            self.handle(ModelChanged(executor.name, session, model, state, LOAD_MS))
            return
        lease = min(executor.leases.values(), key=lambda lease: lease.ends_ms)
        name = lease.request.request_id
        del executor.leases[name]
        outcome = LeaseOutcome.COMPLETED if name in self.clients else LeaseOutcome.REVOKED
        ref = (executor.name, session, name, EPOCH, lease.attempt)
        self.handle(LeaseEnded(*ref, outcome, lease.num_tokens))

    # --- clients ------------------------------------------------------------------------

    def is_waiting(self, request_id: str) -> bool:
        """Whether a live request has no lease."""
        status = self.core.status(request_id, self.now_ms)
        return status is not None and not status.is_running

    def waiting(self) -> list[Client]:
        """By arrival."""
        return [client for name, client in self.clients.items() if self.is_waiting(name)]

    def top_up(self) -> None:
        """Every stream asks again until enough of it waits or it is refused."""
        for stream in self.streams.values():
            num = sum(client.stream is stream for client in self.waiting())
            while num < stream.depth and self.submit(stream):
                num = sum(client.stream is stream for client in self.waiting())

    def submit(self, stream: Stream) -> bool:
        """One request; whether it was accepted."""
        self._num_requests += 1
        request = Request(
            request_id=f"r{self._num_requests}",
            tenant=stream.tenant,
            model=stream.model,
            band=stream.band,
            num_prompt_tokens=NUM_PROMPT,
            max_tokens=MAX_TOKENS,
            num_samples=1,
            num_bytes=1,
            queue_timeout_ms=stream.queue_timeout_ms,
            execution_timeout_ms=FOREVER_MS,
            session_id=stream.session_id,
        )
        # known before the core answers: it may be granted in the same breath
        self.clients[request.request_id] = Client(request, stream, self.now_ms)
        effects = self.core.handle(Submit(request), self.now_ms)
        if RequestAdmitted(request) not in effects.send:
            del self.clients[request.request_id]
            return False
        for action in effects.send:
            self._obey(action)
        self._heard(Submit(request), list(effects.send))
        return True

    # --- executors ----------------------------------------------------------------------

    def attach(self, executor: Executor) -> None:
        """A new process, with nothing but the models that fit."""
        self._num_sessions += 1
        executor.session = self._num_sessions
        executor.incarnation += 1
        executor.models = set(sorted(executor.offers)[: executor.max_models])
        executor.is_draining = False
        self.executors[executor.name] = executor
        self.handle(
            ExecutorAttached(
                executor_id=executor.name,
                session=executor.session,
                incarnation=str(executor.incarnation),
                num_slots=executor.num_slots,
                max_models=executor.max_models,
                models=tuple(
                    ModelOffer(model, model in executor.models, LOAD_MS)
                    for model in sorted(executor.offers)
                ),
            )
        )

    def lose(self, executor: Executor) -> int | None:
        """It is gone with all that it had; its last session."""
        session, executor.session = executor.session, None
        executor.leases.clear()
        executor.loading = None
        return session
