"""What the core holds: settings, and the mutable records of requests, executors and leases.

Rule: records are changed by the core only, under one ``handle`` call at a time; the shell sees
messages. A request is waiting (no lease) or running (one lease, maybe in doubt), and is gone from
the core when it finished. A lease lives in the books of one executor until that executor said
that it ended, or counts as dead: finishing a request does not free a slot, the executor does.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from headway.reasons import Reason
from scheduler_svc.core.messages import Request

Rank = tuple[int, int]  # (band, arrival number): smaller is granted earlier
LeaseKey = tuple[str, int, int]  # (request_id, epoch, attempt): the name of one grant

# Reasons that carry Retry-After; the same as in the table of headway.errors.
RETRYABLE = frozenset(
    {
        Reason.QUEUE_FULL,
        Reason.QUOTA_EXCEEDED,
        Reason.DEADLINE_UNREACHABLE,
        Reason.NO_CAPACITY,
        Reason.QUEUE_TIMEOUT,
        Reason.DRAINING,
        Reason.NOT_LEADER,
    }
)


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """Every limit of the core; ``scheduler_svc.settings`` documents each for operators."""

    max_queued_requests: int = 20_000
    max_queued_tokens: int = 200_000_000
    max_queued_bytes: int = 1 << 30
    max_inflight: int = 20_000
    max_inflight_per_tenant: int = 10_000
    max_inflight_per_model: int = 20_000
    max_executors: int = 4_096
    max_known_models: int = 10_000
    max_finished_keys: int = 100_000
    num_bands: int = 4
    executor_grace_ms: int = 1_000
    revoke_timeout_ms: int = 5_000
    max_attempts: int = 3
    result_ttl_ms: int = 3_600_000
    retry_after_min_ms: int = 1_000
    retry_after_max_ms: int = 60_000


class LeaseState(StrEnum):
    """Where a lease in an executor's books stands."""

    HELD = "held"
    # its request is over; the executor was told and has not confirmed yet
    REVOKING = "revoking"
    # the executor's session is gone and its grace is not
    IN_DOUBT = "in_doubt"


@dataclass(slots=True)
class Lease:
    """One grant of a request to an executor."""

    key: LeaseKey
    executor_id: str
    # seats that it takes: min(num_samples, the executor's slots when it was granted)
    num_slots: int
    granted_ms: int
    state: LeaseState = LeaseState.HELD


@dataclass(slots=True)
class RequestRecord:
    """An accepted request that has not finished."""

    request: Request
    # given once, kept when it goes back to the queue: the order inside a band
    arrival: int
    accepted_ms: int
    # the end of whichever clock runs: queueing until the first grant, then executing
    deadline_ms: int
    # grants and adoptions so far; the number of the current or latest lease
    attempt: int = 0
    # attempts that ended with the loss of their executor; < max_attempts
    num_crashes: int = 0
    first_grant_ms: int | None = None
    first_token_ms: int | None = None
    # None exactly while it is in the queue
    lease: Lease | None = None

    @property
    def rank(self) -> Rank:
        """Its place in the grant order."""
        return (self.request.band, self.arrival)


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that needs several slots has first call on an executor (placement.py)."""

    executor_id: str
    model: str
    request_id: str
    rank: Rank


@dataclass(slots=True)
class ExecutorRecord:
    """An executor that is attached, or lost and inside its grace."""

    executor_id: str
    incarnation: str
    # order of first attach, the last tie-break
    number: int
    num_slots: int = 0
    max_models: int = 0
    offered_models: frozenset[str] = frozenset()
    resident_models: tuple[str, ...] = ()
    # None exactly while it is lost
    session: int | None = None
    is_draining: bool = False
    # the session that was told ExecutorDrained
    drained_session: int | None = None
    # held, being revoked and in doubt; all in doubt while it is lost, none while it is not
    leases: dict[LeaseKey, Lease] = field(default_factory=dict)
    # sum of num_slots over leases held or being revoked
    num_leased: int = 0
    # sum of num_slots over leases in doubt
    num_in_doubt: int = 0
    claim: Claim | None = None

    @property
    def num_used(self) -> int:
        """Seats taken. Above num_slots only after capacity fell, or when it attached with more."""
        return self.num_leased + self.num_in_doubt

    @property
    def num_free(self) -> int:
        """free + leased + in doubt = num_slots, unless more is used than there is: then 0."""
        return max(0, self.num_slots - self.num_used)

    @property
    def is_serving(self) -> bool:
        """New work may go there as far as slots allow."""
        return self.session is not None and not self.is_draining and self.num_slots > 0

    def book(self, lease: Lease) -> None:
        """Enter a lease, or enter it again after its state changed."""
        self.strike(lease)
        self.leases[lease.key] = lease
        if lease.state is LeaseState.IN_DOUBT:
            self.num_in_doubt += lease.num_slots
        else:
            self.num_leased += lease.num_slots

    def strike(self, lease: Lease) -> None:
        """Give a lease's slots back and forget it; once only, a second time changes nothing."""
        if self.leases.pop(lease.key, None) is None:
            return
        if lease.state is LeaseState.IN_DOUBT:
            self.num_in_doubt -= lease.num_slots
        else:
            self.num_leased -= lease.num_slots

    def move(self, lease: Lease, state: LeaseState) -> None:
        """Change a booked lease's state and with it the sum that its slots count in."""
        self.strike(lease)
        lease.state = state
        self.book(lease)
