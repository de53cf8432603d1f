"""A core with executors that keep their word and clients that never let up, on a virtual clock.

A stream of a client keeps so many requests waiting, whatever is granted, ends or times out.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scheduler_svc.core.domain import CoreSettings, RequestRecord
from scheduler_svc.core.messages import (
    Action,
    Event,
    ExecutorDisconnected,
    LeaseAdopted,
    LeaseGranted,
    LeaseRevoked,
    ModelLoadOrdered,
    Request,
    RequestAdmitted,
    RequestFinished,
    SessionClosed,
    Submit,
    Tick,
)
from scheduler_svc.core.scheduler import Scheduler
from tests.machine.honest_executor import EPOCH, FOREVER_MS, Executor, Lease

LOAD_MS = 100
NUM_PROMPT = 10
MAX_TOKENS = 5


@dataclass(frozen=True)
class Stream:
    """A client that keeps ``depth`` requests waiting; each runs ``lease_ms``, and each sample that
    it asked for generates ``num_tokens``."""

    tenant: str
    model: str
    band: int
    depth: int
    lease_ms: int
    num_tokens: int
    session_id: str = ""
    queue_timeout_ms: int = FOREVER_MS
    num_samples: int = 1
    execution_timeout_ms: int = FOREVER_MS
    prefix_hashes: tuple[int, ...] = ()
    # of the prompt, where it runs
    num_cached: int = 0


@dataclass
class Client:
    """What is known of an accepted request that has not ended."""

    request: Request
    stream: Stream
    accepted_ms: int
    was_granted: bool = False
    # the core's own, so that no question needs to be asked of it
    record: RequestRecord | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it has no lease, if it is live."""
        return self.record is not None and self.record.lease is None


class World:
    """Carries out what the core sends. ``heard`` is told of each event and what it led to."""

    def __init__(
        self,
        settings: CoreSettings,
        heard: Callable[[Event, list[Action]], None],
        load_ms: Mapping[str, int] | None = None,
    ):
        self.core = Scheduler(settings, EPOCH)
        self.now_ms = 0
        self.executors: dict[str, Executor] = {}
        self.streams: dict[tuple[str, str, int], Stream] = {}
        # live ones by arrival
        self.clients: dict[str, Client] = {}
        self._heard = heard
        self._load_ms = load_ms or {}
        self._max_waiting = settings.max_queued_requests
        self._num_requests = 0
        self._num_sessions = 0
        # streams may have less waiting than they keep
        self._is_short = False

    # --- time ---------------------------------------------------------------------------

    def run(self, ms: int) -> None:
        """Everything that happens by itself in so long."""
        end_ms = self.now_ms + ms
        self.top_up()
        while True:
            due_ms = self.core.next_deadline_ms()
            executor = min(self.executors.values(), key=lambda e: (e.next_ms, e.name))
            next_ms = executor.next_ms
            if due_ms is not None and due_ms < next_ms:
                if due_ms > end_ms:
                    break
                self.now_ms = max(due_ms, self.now_ms)
                self.tick()
            else:
                if next_ms > end_ms:
                    break
                self.now_ms = max(next_ms, self.now_ms)
                self.handle(executor.say(self.now_ms))
            if self._is_short:
                self.top_up()
        self.now_ms = end_ms
        self.tick()

    def tick(self) -> None:
        """After it nothing is due."""
        self.handle(Tick())
        due_ms = self.core.next_deadline_ms()
        assert due_ms is None or due_ms > self.now_ms

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
                self._is_short = True
            case LeaseRevoked():
                self.executors[action.executor_id].revoke(action, self.now_ms)
            case LeaseAdopted():
                self.executors[action.executor_id].adopt(action)
                self._is_short = True
            case ModelLoadOrdered():
                load_ms = self.load_ms(action.model)
                self.executors[action.executor_id].load(action, self.now_ms + load_ms)
            case SessionClosed():
                raise AssertionError("honest executors are not cut")
            case _:
                pass

    def load_ms(self, model: str) -> int:
        """How long loading it takes anywhere."""
        return self._load_ms.get(model, LOAD_MS)

    def _start(self, action: LeaseGranted) -> None:
        client = self.clients[action.request_id]
        stream, executor = client.stream, self.executors[action.executor_id]
        client.was_granted = self._is_short = True
        lease = Lease(
            client.request,
            min(stream.num_samples, executor.num_slots),
            action.attempt,
            self.now_ms + stream.lease_ms,
            stream.num_tokens,
            stream.num_cached,
        )
        executor.start(action, lease)

    # --- clients ------------------------------------------------------------------------

    def is_waiting(self, request_id: str) -> bool:
        """Whether a request is live and has no lease."""
        client = self.clients.get(request_id)
        return client is not None and client.is_waiting

    def waiting(self) -> list[Client]:
        """By arrival."""
        return [client for client in self.clients.values() if client.is_waiting]

    def top_up(self) -> None:
        """Every stream asks again until enough of it waits or it is refused."""
        self._is_short = False
        waiting = Counter(id(client.stream) for client in self.waiting())
        for stream in self.streams.values():
            num_missing = stream.depth - waiting[id(stream)]
            while (
                num_missing > 0
                and self.core.num_waiting < self._max_waiting
                and (client := self.submit(stream)) is not None
            ):
                num_missing -= client.is_waiting

    def submit(self, stream: Stream) -> Client | None:
        """One request, if it was accepted."""
        self._num_requests += 1
        request = Request(
            request_id=f"r{self._num_requests}",
            tenant=stream.tenant,
            model=stream.model,
            band=stream.band,
            num_prompt_tokens=NUM_PROMPT,
            max_tokens=MAX_TOKENS,
            num_samples=stream.num_samples,
            num_bytes=1,
            queue_timeout_ms=stream.queue_timeout_ms,
            execution_timeout_ms=stream.execution_timeout_ms,
            session_id=stream.session_id,
            prefix_hashes=stream.prefix_hashes,
        )
        # known before the core answers: it may be granted in the same breath
        client = self.clients[request.request_id] = Client(request, stream, self.now_ms)
        effects = self.core.handle(Submit(request), self.now_ms)
        client.record = self.core._state.requests.get(request.request_id)
        if RequestAdmitted(request) not in effects.send:
            del self.clients[request.request_id]
            return None
        for action in effects.send:
            self._obey(action)
        self._heard(Submit(request), list(effects.send))
        return client

    # --- executors ----------------------------------------------------------------------

    def attach(self, executor: Executor) -> None:
        """A new process."""
        self._num_sessions += 1
        executor.begin(self._num_sessions)
        self.executors[executor.name] = executor
        self._hello(executor)

    def come_back(self, executor: Executor) -> None:
        """The same process on a new stream, with what it has."""
        self._num_sessions += 1
        executor.session = self._num_sessions
        # an order to drain is forgotten with its record
        executor.is_draining &= executor.name in self.core._state.fleet.executors
        self._hello(executor)

    def _hello(self, executor: Executor) -> None:
        load_ms = {model: self.load_ms(model) for model in executor.offers}
        self.handle(executor.hello(load_ms))

    def lose(self, executor: Executor) -> None:
        """It is gone with all that it had."""
        self._disconnected(executor, executor.lose())

    def leave(self, executor: Executor) -> None:
        """Its stream broke."""
        self._disconnected(executor, executor.leave())

    def _disconnected(self, executor: Executor, session: int | None) -> None:
        self._is_short = True
        if session is not None:
            self.handle(ExecutorDisconnected(executor.name, session))
