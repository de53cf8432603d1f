"""What the core is told and what that leads to: events in, effects out.

Rule: ``Scheduler.handle(event, now_ms) -> Effects``. Events are facts that the shell saw, in the
order it saw them; effects are to be carried out in order, everything in ``persist`` before
anything in ``send``. ``now_ms`` is monotonic milliseconds. The shell makes ids and seeds.

Executors are named by (executor_id, session): a session is one Attach stream, numbered by the
shell. An event of a session that is no longer the executor's current one is dropped.

What the core says when it is asked, which changes nothing, is in answers.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from headway.reasons import Reason
from scheduler_svc.core.message import message


@dataclass(frozen=True, slots=True)
class Request:
    """A valid request: every default is filled in, every field within the shell's limits.

    ``num_bytes`` is what the request costs in memory until its result expires.
    ``body_hash`` is compared when the same (tenant, idempotency_key) comes again.
    """

    request_id: str
    tenant: str
    model: str
    band: int
    num_prompt_tokens: int
    max_tokens: int
    num_samples: int
    num_bytes: int
    queue_timeout_ms: int
    execution_timeout_ms: int
    session_id: str = ""
    idempotency_key: str = ""
    body_hash: bytes = b""
    # Chained hashes of the prompt's blocks, tenant-salted, shortest prefix first.
    prefix_hashes: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Most tokens that it can hold in a KV cache at once."""
        return self.num_prompt_tokens + self.max_tokens * self.num_samples


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """A model that an executor can serve, and whether its weights are on the device.

    ``load_ms`` is how long loading it there takes; None if nothing is known. ``is_loading``: an
    earlier session ordered it, and it is on its way; one model at most.
    """

    model: str
    is_resident: bool
    load_ms: int | None = None
    is_loading: bool = False


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease that a re-attaching executor still holds from an earlier session.

    ``model`` and ``num_slots`` (from 1 on) are the executor's word on what it takes.
    """

    request_id: str
    epoch: int
    attempt: int
    model: str
    num_slots: int
    has_ended: bool


class LeaseOutcome(StrEnum):
    """How a lease ended, in the executor's words (fleet.proto)."""

    COMPLETED = "completed"
    FAILED = "failed"
    REVOKED = "revoked"
    RETURNED = "returned"
    UNKNOWN = "unknown"


# --- events ---------------------------------------------------------------------------------


@message(frozen=True, slots=True)
class Submit:
    """A client asks; answered by RequestAdmitted, RequestDeduplicated or RequestRejected."""

    request: Request


@message(frozen=True, slots=True)
class Cancel:
    """A client no longer wants a request; unknown, finished and foreign ones are left alone."""

    request_id: str
    tenant: str


@message(frozen=True, slots=True)
class ExecutorAttached:
    """An executor opened a session; a session it had before is over.

    A new ``incarnation`` means a new process: what the old one held is lost.
    """

    executor_id: str
    session: int
    incarnation: str
    num_slots: int
    max_models: int
    models: tuple[ModelOffer, ...]
    held: tuple[HeldLease, ...] = ()


@message(frozen=True, slots=True)
class ExecutorCapacityChanged:
    """An executor can take more or less than before; what runs goes on."""

    executor_id: str
    session: int
    num_slots: int
    max_models: int


@message(frozen=True, slots=True)
class ExecutorDisconnected:
    """A session broke; its leases are in doubt until the executor is back or its grace ends."""

    executor_id: str
    session: int


class ModelState(StrEnum):
    """What became of a model on an executor (fleet.proto)."""

    RESIDENT = "resident"
    ABSENT = "absent"
    FAILED = "failed"


@message(frozen=True, slots=True)
class ModelChanged:
    """A model came to an executor's device (``load_ms`` is how long it took), left, or failed."""

    executor_id: str
    session: int
    model: str
    state: ModelState
    load_ms: int | None = None
    message: str = ""


@message(frozen=True, slots=True)
class LeaseStarted:
    """The first token of a lease arrived."""

    executor_id: str
    session: int
    request_id: str
    attempt: int


@message(frozen=True, slots=True)
class LeaseEnded:
    """An executor's last word on a lease, its tokens complete in the relay.

    ``epoch`` differs from the core's own for a lease that an earlier scheduler granted.
    ``reason`` and ``message`` are for FAILED only. ``num_cached_tokens`` of the prompt were in a
    cache when it began.
    """

    executor_id: str
    session: int
    request_id: str
    epoch: int
    attempt: int
    outcome: LeaseOutcome
    num_generated_tokens: int = 0
    reason: Reason | None = None
    message: str = ""
    num_cached_tokens: int = 0


@message(frozen=True, slots=True)
class DrainExecutor:
    """An operator (or the executor itself) wants no new work on it."""

    executor_id: str


@message(frozen=True, slots=True)
class UndrainExecutor:
    """An operator takes a drained executor back into service."""

    executor_id: str


@message(frozen=True, slots=True)
class CloseDoor:
    """The scheduler shuts down: refuse new requests with DRAINING, finish the others."""


@message(frozen=True, slots=True)
class Tick:
    """Nothing happened but time; sent when ``Scheduler.next_deadline_ms`` has come."""


Event = (
    Submit
    | Cancel
    | ExecutorAttached
    | ExecutorCapacityChanged
    | ExecutorDisconnected
    | ModelChanged
    | LeaseStarted
    | LeaseEnded
    | DrainExecutor
    | UndrainExecutor
    | CloseDoor
    | Tick
)


# --- effects --------------------------------------------------------------------------------


@message(frozen=True, slots=True)
class RequestAdmitted:
    """The request is in our care. Persisted before it is answered."""

    request: Request


@message(frozen=True, slots=True)
class RequestDeduplicated:
    """Same key, same body: the client gets the earlier request, live or finished."""

    request_id: str
    original_id: str


@message(frozen=True, slots=True)
class RequestRejected:
    """Never queued. ``retry_after_ms`` is None where trying again is no use."""

    request_id: str
    reason: Reason
    message: str
    retry_after_ms: int | None = None


@message(frozen=True, slots=True)
class RequestFinished:
    """The one end of a request; ``reason`` is None when it succeeded. Persisted, then sent.

    Times are since acceptance; None where that point was never reached.
    """

    request_id: str
    reason: Reason | None
    message: str
    queued_ms: int | None
    first_token_ms: int | None
    total_ms: int
    num_attempts: int
    retry_after_ms: int | None = None
    # the part of queued_ms in which no executor had the model
    model_wait_ms: int | None = None


@message(frozen=True, slots=True)
class LeaseGranted:
    """Start this request on this executor; the relay adds what earlier attempts generated."""

    executor_id: str
    session: int
    request_id: str
    attempt: int


@message(frozen=True, slots=True)
class LeaseAdopted:
    """A held lease goes on under a new attempt; always part of the answer to an attach."""

    executor_id: str
    session: int
    request_id: str
    held_epoch: int
    held_attempt: int
    attempt: int


@message(frozen=True, slots=True)
class LeaseRevoked:
    """The executor is to stop this lease; its slots stay taken until it says that it did."""

    executor_id: str
    session: int
    request_id: str
    epoch: int
    attempt: int


@message(frozen=True, slots=True)
class LeaseAcknowledged:
    """The end of this lease is safe; the executor may forget it."""

    executor_id: str
    session: int
    request_id: str
    epoch: int
    attempt: int


@message(frozen=True, slots=True)
class ModelLoadOrdered:
    """Put a model on the device after taking ``evict`` off; nothing runs of what is evicted."""

    executor_id: str
    session: int
    model: str
    evict: tuple[str, ...]


@message(frozen=True, slots=True)
class ExecutorWelcomed:
    """The session stands; precedes its LeaseAdopted and LeaseRevoked effects."""

    executor_id: str
    session: int


@message(frozen=True, slots=True)
class SessionClosed:
    """Cut this session; ``message`` says why: it was replaced, the fleet is full, or a revoke or a
    load was not answered in time."""

    executor_id: str
    session: int
    message: str


@message(frozen=True, slots=True)
class ExecutorDrained:
    """A draining executor holds nothing any more."""

    executor_id: str
    session: int


Record = RequestAdmitted | RequestFinished
Action = (
    RequestAdmitted
    | RequestDeduplicated
    | RequestRejected
    | RequestFinished
    | LeaseGranted
    | LeaseAdopted
    | LeaseRevoked
    | LeaseAcknowledged
    | ModelLoadOrdered
    | ExecutorWelcomed
    | SessionClosed
    | ExecutorDrained
)


@message(frozen=True, slots=True)
class Decision:
    """Why something was decided, in one line for people; only with ``has_decision_log``.

    Of kind "grant", "reject", "reserve", "release", "load" and "resident" are what was done;
    "overtake", "refund" and "requeue" are what else may let a position rise (estimate.py).
    """

    kind: str
    request_id: str
    model: str
    text: str


@message(frozen=True, slots=True)
class Effects:
    """What the shell must do: commit ``persist``, then carry out ``send`` in order.

    ``decisions`` are for the log and change nothing.
    """

    persist: Sequence[Record] = ()
    send: Sequence[Action] = ()
    decisions: Sequence[Decision] = ()
