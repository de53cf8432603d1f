"""What the core answers when it is asked: where a request stands, and the whole of queue and fleet.

Rule: an answer is of one instant, is made for its reader and refers to nothing that changes.
"""

from scheduler_svc.core.message import message


@message(frozen=True, slots=True)
class RequestStatus:
    """Where a live request stands (generation.proto, QueueStatus)."""

    is_running: bool
    position: int
    depth: int
    estimated_wait_ms: int | None
    retry_after_ms: int


@message(frozen=True, slots=True)
class QueueRow:
    """One waiting request, for operators; ``priority`` is None where warm_bonus is 0."""

    request_id: str
    model: str
    tenant: str
    band: int
    waited_ms: int
    status: RequestStatus
    session_id: str = ""
    num_tokens: int = 0
    priority: float | None = None


@message(frozen=True, slots=True)
class ReservationRow:
    """Room that is kept on an executor: for which model, why (domain.Why), and until when."""

    model: str
    reason: str
    age_ms: int
    remaining_ms: int


@message(frozen=True, slots=True)
class ExecutorStats:
    """What an executor did in the last hour, or since it is known if that is less.

    ``utilisation`` is slot-time used / slot-time there, 0 to 1; ``mean_duration_ms`` is over
    leases that completed; ``affinity`` is hits / (hits + misses) of session preferences. None
    where nothing was seen.
    """

    num_leases: int
    share: float | None
    utilisation: float | None
    mean_duration_ms: float | None
    affinity: float | None


@message(frozen=True, slots=True)
class ExecutorRow:
    """One executor, for operators; num_slots = free + leased + in doubt (never below 0 free)."""

    executor_id: str
    state: str  # "attached" | "lost" | "draining"
    num_slots: int
    num_free: int
    num_leased: int
    num_in_doubt: int
    resident_models: tuple[str, ...]
    max_models: int
    loading_model: str | None = None
    held_models: tuple[str, ...] = ()
    # that leases of it run, or are in doubt
    active_models: tuple[str, ...] = ()
    reservation: ReservationRow | None = None
    stats: ExecutorStats | None = None


@message(frozen=True, slots=True)
class SessionTotals:
    """Sessions that are remembered, and how often the preferred executor served (or not)."""

    num_tracked: int = 0
    num_hits: int = 0
    num_misses: int = 0


@message(frozen=True, slots=True)
class FailureRow:
    """Loads of a model that failed: why the last one did, on how many executors theirs did, and
    for how long yet it is refused since nobody can load it, 0 if somebody might."""

    message: str
    num_executors: int
    refused_ms: int


@message(frozen=True, slots=True)
class ModelRow:
    """One known model: first grants and their tokens since the start, and what is there now.

    ``failure`` is None unless loads failed since one worked last.
    """

    model: str
    num_requests: int
    num_tokens: int
    num_sessions: int
    num_waiting: int
    num_running: int
    num_homes: int
    failure: FailureRow | None = None


@message(frozen=True, slots=True)
class Snapshot:
    """Queue and fleet at one instant.

    ``queue_wait_ms`` holds (p10, mean, p90, number of samples) of waits until the first grant in
    the last hour, None without samples.
    """

    num_waiting: int
    num_running: int
    queue: tuple[QueueRow, ...]
    executors: tuple[ExecutorRow, ...]
    decisions: dict[str, int]
    queue_wait_ms: tuple[float, float, float, int] | None = None
    sessions: SessionTotals = SessionTotals()
    models: tuple[ModelRow, ...] = ()
