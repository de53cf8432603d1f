"""What the executor's session is told and what it answers (the words of fleet.proto, no protobuf).

Rule: ``Session.handle(event, now_ms)`` gives effects for the engine, to be carried out in order.
What goes to the scheduler is pulled instead (``hello``, ``take_report``, ``heartbeat``), because
only the stream knows when it can take the next message. ``now_ms`` is monotonic milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from executor_svc.core.engine import (
    LeaseRequest,
    PromptScores,
    PromptScoring,
    SamplingParams,
    SequenceEnd,
    StepOutput,
)
from headway.reasons import Reason


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """Names one grant of a request; of two grants the larger ``fence`` is the newer one."""

    request_id: str
    epoch: int
    attempt: int

    @property
    def fence(self) -> tuple[int, int]:
        return self.epoch, self.attempt


class Outcome(StrEnum):
    """How a lease ended; UNKNOWN is said of a lease that this executor does not hold."""

    COMPLETED = "completed"
    FAILED = "failed"
    REVOKED = "revoked"
    RETURNED = "returned"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a lease failed; ``message`` is for clients."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class GeneratedSample:
    """What earlier attempts made of one sample; ``logprobs`` is parallel or empty.

    ``top_token_ids`` and ``top_logprobs`` hold ``top_logprobs`` alternatives for each token.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    end: SequenceEnd | None = None
    top_token_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Grant:
    """A new lease; ``generated`` is empty or has one entry for each sample.

    ``scoring`` is what the prompt is to be scored for; with ``has_prompt_scores`` the scheduler
    has the answer from an earlier attempt. ``cache_salt`` as in LeaseRequest.
    """

    ref: LeaseRef
    handle: int
    model: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    num_samples: int = 1
    wants_logprobs: bool = False
    generated: tuple[GeneratedSample, ...] = ()
    scoring: PromptScoring | None = None
    has_prompt_scores: bool = False
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Put a model on the device, after taking ``evict`` off."""

    model: str
    evict: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Adopt:
    """The lease that hello listed as ``held`` goes on as ``ref``; resend from ``next_index``, and
    the prompt's scores unless the scheduler has them."""

    held: LeaseRef
    ref: LeaseRef
    handle: int
    next_index: tuple[int, ...]
    has_prompt_scores: bool = False


# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The scheduler took us; what it did not adopt of our hello it does not want."""

    orphan_grace_ms: int
    adopts: tuple[Adopt, ...] = ()


@dataclass(frozen=True, slots=True)
class OrdersReceived:
    """Orders, handled in the order of the fields."""

    grants: tuple[Grant, ...] = ()
    acknowledged: tuple[LeaseRef, ...] = ()
    revokes: tuple[LeaseRef, ...] = ()
    loads: tuple[LoadOrder, ...] = ()


@dataclass(frozen=True, slots=True)
class StepDone:
    """The engine made one or more steps, merged in order."""

    output: StepOutput


@dataclass(frozen=True, slots=True)
class LeaseRefused:
    """The engine can never run the lease with this key; ``message`` is for the client."""

    key: int
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    """The engine has put a model on the device."""

    model: str
    load_ms: int
    exactness_class: str = ""


@dataclass(frozen=True, slots=True)
class ModelLoadFailed:
    """The engine could not; the model is absent, and so is what was to make room for it."""

    model: str
    message: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The stream broke, before or after its welcome."""


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """The process is to end: take nothing new, finish what runs."""


@dataclass(frozen=True, slots=True)
class DrainExpired:
    """No time is left to finish: hand back what still runs."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened but time; sent when ``Session.orphan_deadline_ms`` has come."""


Event = (
    Welcomed
    | OrdersReceived
    | StepDone
    | LeaseRefused
    | ModelLoaded
    | ModelLoadFailed
    | Disconnected
    | DrainStarted
    | DrainExpired
    | Tick
)


# --- effects --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartLease:
    """Hand this to the engine."""

    request: LeaseRequest


@dataclass(frozen=True, slots=True)
class AbortLease:
    """Make the engine forget the lease with this key."""

    key: int


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Have the engine put a model on the device; answered by ModelLoaded or ModelLoadFailed."""

    model: str
    evict: tuple[str, ...]


Effect = StartLease | AbortLease | LoadModel


# --- what the scheduler is told -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease as hello lists it; ``num_tokens`` counts over all attempts, for each sample.

    ``num_slots`` is what it takes there until its end (fleet.proto).
    """

    ref: LeaseRef
    model: str
    num_slots: int
    num_tokens: tuple[int, ...]
    has_ended: bool


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """The last word on a lease; ``num_cached_prompt_tokens`` were in a cache when it began."""

    ref: LeaseRef
    outcome: Outcome
    num_tokens: tuple[int, ...] = ()
    failure: Failure | None = None
    num_cached_prompt_tokens: int = 0


class ModelState(StrEnum):
    """What became of a model; FAILED is absent after a load that did not work."""

    RESIDENT = "resident"
    ABSENT = "absent"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelChange:
    """A model came to the device, left it or could not be loaded; ``message`` is for operators."""

    model: str
    state: ModelState
    load_ms: int | None = None
    message: str = ""
    exactness_class: str = ""


@dataclass(slots=True)
class Frame:
    """Tokens as parallel arrays; ``logprob`` and ``num_top`` are parallel, or empty when nobody
    asked. The alternatives of all entries stand one after the other.

    The ``key`` of an entry in ``ends`` and ``prompt_scores`` is a handle.
    """

    handle: list[int] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    token_id: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    ends: list[SequenceEnd] = field(default_factory=list)
    num_top: list[int] = field(default_factory=list)
    top_token_id: list[int] = field(default_factory=list)
    top_logprob: list[float] = field(default_factory=list)
    prompt_scores: list[PromptScores] = field(default_factory=list)

    def is_empty(self) -> bool:
        return not (self.handle or self.ends or self.prompt_scores)


@dataclass(frozen=True, slots=True)
class Report:
    """What happened since the last report; ``num_slots`` is None when it is as before."""

    num_slots: int | None
    frame: Frame
    ended: tuple[LeaseEnded, ...]
    models: tuple[ModelChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What the executor holds, by handle, and the highest handle that arrived."""

    handles: tuple[int, ...]
    last_handle: int
