"""What all reference policies share: the books, and the words of the core's protocol.

Rule: a reference decides in ``_cycle``, called after every event and whenever it asked to be
called; everything else is here and the same for all. It knows as much of faults as it takes to
lose nothing: what a lost executor had waits again, at its old place.

A backend of theirs loads a model when a request for it comes. Here the grant is preceded by a
ModelLoadOrdered that evicts the idle model used longest ago, and the request waits there for the
load (its wait counts until the load is done, see metrics.py).
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from headway.reasons import Reason
from scheduler_svc.core.answers import RequestStatus
from scheduler_svc.core.messages import (
    Action,
    Cancel,
    Effects,
    Event,
    ExecutorAttached,
    ExecutorDisconnected,
    ExecutorWelcomed,
    LeaseAcknowledged,
    LeaseEnded,
    LeaseGranted,
    LeaseOutcome,
    LeaseRevoked,
    ModelChanged,
    ModelLoadOrdered,
    ModelState,
    Request,
    RequestAdmitted,
    RequestFinished,
    Submit,
)

_EPOCH = 1


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue, or running."""

    request: Request
    arrival: int
    accepted_ms: int
    attempt: int = 0
    first_grant_ms: int | None = None


@dataclass(slots=True, eq=False)
class Backend:
    """An executor as a reference policy sees it."""

    executor_id: str
    number: int
    session: int
    num_slots: int
    max_models: int
    models: frozenset[str]
    # on the device or ordered, the one used longest ago first
    resident: OrderedDict[str, None]
    # request id -> what runs or waits for its load here
    running: dict[str, Waiting] = field(default_factory=dict)
    # model -> how many of them
    active: dict[str, int] = field(default_factory=dict)
    # the warm hold after the last request of a model ended
    held_model: str | None = None
    held_until_ms: int = 0

    @property
    def num_free(self) -> int:
        """Slots without a request."""
        return max(0, self.num_slots - len(self.running))

    def has_room_for(self, model: str) -> bool:
        """The limit of models would allow it."""
        return model in self.active or len(self.active) < self.max_models


class ReferencePolicy:
    """Base of the reference policies; not for production."""

    def __init__(self) -> None:
        self._now_ms = 0
        self._requests: dict[str, Waiting] = {}
        # model -> its queue, oldest first; no empty ones
        self._queues: dict[str, deque[Waiting]] = {}
        self._backends: dict[str, Backend] = {}
        self._num_arrivals = 0
        self._num_backends = 0
        self._send: list[Action] = []
        # (when the queue timeout of a request ends, request id), in order of arrival
        self._timeouts: deque[tuple[int, str]] = deque()

    # --- for those who derive from this ---------------------------------------------------

    def _cycle(self) -> None:
        """Place what can be placed."""
        raise NotImplementedError

    def _released(self, backend: Backend, model: str) -> None:
        """The last request of a model ended on a backend."""

    def _wake_ms(self) -> int | None:
        """When the next cycle is due although nothing happened."""
        return None

    def _serving(self, model: str) -> Iterable[Backend]:
        """Live backends that can serve a model, in the order in which they came."""
        return (backend for backend in self._backends.values() if model in backend.models)

    def _grant(self, backend: Backend, model: str) -> None:
        """The oldest request of a model goes to a backend."""
        queue = self._queues[model]
        waiting = queue.popleft()
        if not queue:
            del self._queues[model]
        self._ensure_resident(backend, model)
        backend.running[waiting.request.request_id] = waiting
        backend.active[model] = backend.active.get(model, 0) + 1
        backend.held_model = None
        waiting.attempt += 1
        if waiting.first_grant_ms is None:
            waiting.first_grant_ms = self._now_ms
        self._send.append(
            LeaseGranted(
                backend.executor_id, backend.session, waiting.request.request_id, waiting.attempt
            )
        )

    def _ensure_resident(self, backend: Backend, model: str) -> None:
        if model in backend.resident:
            backend.resident.move_to_end(model)
            return
        evict: tuple[str, ...] = ()
        if len(backend.resident) >= backend.max_models:
            evict = (next(other for other in backend.resident if other not in backend.active),)
            del backend.resident[evict[0]]
        backend.resident[model] = None
        self._send.append(ModelLoadOrdered(backend.executor_id, backend.session, model, evict))

    # --- the interface --------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> Effects:
        """Apply an event."""
        self._now_ms = now_ms
        match event:
            case Submit(request):
                self._submit(request)
            case Cancel():
                self._end(event.request_id, Reason.CANCELLED)
            case ExecutorAttached():
                self._attach(event)
            case ExecutorDisconnected():
                self._lose(event.executor_id, event.session)
            case LeaseEnded():
                self._lease_ended(event)
            case ModelChanged() if event.state is not ModelState.RESIDENT:
                backend = self._current(event.executor_id, event.session)
                if backend is not None and event.state is ModelState.FAILED:
                    backend.resident.pop(event.model, None)
            case _:
                pass
        while self._timeouts and self._timeouts[0][0] <= now_ms:
            waiting = self._requests.get(self._timeouts.popleft()[1])
            if waiting is not None and waiting.first_grant_ms is None:
                self._end(waiting.request.request_id, Reason.QUEUE_TIMEOUT)
        if self._queues:
            self._cycle()
        send, self._send = tuple(self._send), []
        return Effects((), send)

    def next_deadline_ms(self) -> int | None:
        """When a Tick is due."""
        due = [] if not self._timeouts else [self._timeouts[0][0]]
        wake_ms = self._wake_ms()
        if wake_ms is not None:
            due.append(wake_ms)
        return min(due, default=None)

    def status(self, request_id: str, now_ms: int) -> RequestStatus | None:
        """They do not say where a request stands."""
        return None

    # --- the books ------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        self._num_arrivals += 1
        waiting = Waiting(request, self._num_arrivals, self._now_ms)
        self._requests[request.request_id] = waiting
        self._queues.setdefault(request.model, deque()).append(waiting)
        self._timeouts.append((self._now_ms + request.queue_timeout_ms, request.request_id))
        self._send.append(RequestAdmitted(request))

    def _attach(self, event: ExecutorAttached) -> None:
        known = self._backends.get(event.executor_id)
        if known is not None:
            self._lose(event.executor_id, known.session)
        self._num_backends += 1
        self._backends[event.executor_id] = Backend(
            event.executor_id,
            self._num_backends,
            event.session,
            event.num_slots,
            event.max_models,
            frozenset(offer.model for offer in event.models),
            OrderedDict((offer.model, None) for offer in event.models if offer.is_resident),
        )
        # nothing is adopted: what it still holds, it drops when it reads this
        self._send.append(ExecutorWelcomed(event.executor_id, event.session))

    def _lose(self, executor_id: str, session: int) -> None:
        backend = self._current(executor_id, session)
        if backend is None:
            return
        del self._backends[executor_id]
        for waiting in backend.running.values():
            queue = self._queues.setdefault(waiting.request.model, deque())
            queue.append(waiting)
            self._queues[waiting.request.model] = deque(sorted(queue, key=lambda w: w.arrival))

    def _current(self, executor_id: str, session: int) -> Backend | None:
        backend = self._backends.get(executor_id)
        return backend if backend is not None and backend.session == session else None

    def _lease_ended(self, event: LeaseEnded) -> None:
        backend = self._current(event.executor_id, event.session)
        if backend is None:
            return
        waiting = backend.running.pop(event.request_id, None)
        if waiting is not None:
            model = waiting.request.model
            backend.active[model] -= 1
            if not backend.active[model]:
                del backend.active[model]
                self._released(backend, model)
            if event.outcome is LeaseOutcome.COMPLETED:
                self._finish(waiting, None)
        self._send.append(
            LeaseAcknowledged(
                event.executor_id, event.session, event.request_id, event.epoch, event.attempt
            )
        )

    def _end(self, request_id: str, reason: Reason) -> None:
        """A request ends before its work is done."""
        waiting = self._requests.get(request_id)
        if waiting is None:
            return
        self._finish(waiting, reason)
        queue = self._queues.get(waiting.request.model, deque())
        if waiting in queue:
            queue.remove(waiting)
            if not queue:
                del self._queues[waiting.request.model]
            return
        for backend in self._backends.values():
            if request_id in backend.running:
                self._send.append(
                    LeaseRevoked(
                        backend.executor_id, backend.session, request_id, _EPOCH, waiting.attempt
                    )
                )

    def _finish(self, waiting: Waiting, reason: Reason | None) -> None:
        if self._requests.pop(waiting.request.request_id, None) is None:
            return
        queued_ms = waiting.first_grant_ms
        self._send.append(
            RequestFinished(
                request_id=waiting.request.request_id,
                reason=reason,
                message="",
                queued_ms=None if queued_ms is None else queued_ms - waiting.accepted_ms,
                first_token_ms=None,
                total_ms=self._now_ms - waiting.accepted_ms,
                num_attempts=waiting.attempt,
            )
        )
