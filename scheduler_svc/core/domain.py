"""What the core holds: settings, and the mutable records of requests, executors and leases.

Rule: records are changed by the core only, under one ``handle`` call at a time; the shell sees
messages. A request is waiting (no lease) or running (one lease, maybe in doubt), and is gone from
the core when it finished. A lease lives in the books of one executor until that executor said
that it ended, or counts as dead: finishing a request does not free a slot, the executor does.
A model on an executor is resident, loading (one at a time), or neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from headway.reasons import Reason
from scheduler_svc.core.messages import Request
from scheduler_svc.core.stats import Activity

Rank = tuple[int, int]  # (band, key): smaller is granted earlier (priority.py)
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
    band_queue_shares: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85)
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
    # order
    warm_bonus: float = 10.0
    aging_equalization_ms: int = 30_000
    band_min_shares: tuple[float, ...] = (0.0, 0.1, 0.05, 0.05)
    band_max_wait_ms: tuple[int, ...] = (30_000, 60_000, 120_000, 240_000)
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    locality_quantum_tokens: int = 4_096
    locality_max_passes: int = 8
    output_token_weight: int = 2
    max_fair_accounts: int = 100_000
    # models
    model_hold_ms: int = 3_000
    switch_time_share: float = 0.02
    model_limits: Mapping[str, int] = field(default_factory=dict)
    load_timeout_ms: int = 600_000
    load_backoff_ms: int = 1_000
    load_backoff_max_ms: int = 60_000
    max_load_failures: int = 3
    # hints
    session_ttl_ms: int = 300_000
    max_sessions: int = 100_000
    max_prefix_blocks: int = 200_000
    max_wait_samples: int = 10_000
    has_decision_log: bool = False

    @property
    def is_fifo(self) -> bool:
        """Arrival order alone: no bonus, no diversity, no drain."""
        return self.warm_bonus == 0


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
    # of its request; of one whose request is not known, the executor's word
    model: str
    # seats that it takes: min(num_samples, the executor's slots when it was granted), likewise
    num_slots: int
    granted_ms: int
    state: LeaseState = LeaseState.HELD
    # its request, if that ended first: its tenant pays when the lease ends
    debtor: "RequestRecord | None" = None


@dataclass(slots=True, eq=False)
class RequestRecord:
    """An accepted request that has not finished; equal to itself only."""

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
    # until the first grant: how long its model had been nowhere when it came; then, while it waited
    nowhere_ms: int = 0
    # what fairness holds against its tenant for it and has not settled; 0 while it waits
    num_charged_tokens: int = 0
    # how often another tenant's request went before it because its cache was there
    num_passed: int = 0
    # it was granted before: first in its flow
    is_returned: bool = False
    # None exactly while it is in the queue
    lease: Lease | None = None
    # when its clock runs out, the number of that setting (0: not set) and where it is noted;
    # deadlines.py has the word
    due_ms: int = 0
    due_number: int = 0
    due_place: int = 0


class Why(StrEnum):
    """What a reservation is for."""

    # a head that needs several slots of a model that is resident there
    WIDE = "wide"
    # a cold model waits until the executor can take another model
    DRAIN = "drain"
    # the same on the last usable home of a model, for a head that aged past the bonus
    TIME_SLICE = "time_slice"
    # the model is on its way, or just came: seats are kept for its first grant
    LOAD = "load"


@dataclass(slots=True)
class Reservation:
    """An executor's room is kept for a model (drain.py)."""

    executor_id: str
    model: str
    why: Why
    # the head that it was made for; WIDE is for this one alone
    request_id: str
    rank: Rank
    since_ms: int
    # given up then
    deadline_ms: int
    # free slots that other models may not take; all of them while it drains
    num_kept: int
    # when a drain is expected to be over: what ends before it may still start
    expected_ms: int = 0


@dataclass(slots=True)
class Residence:
    """A model on an executor's device."""

    # number of the grant that used it last, among all grants; 0: none
    turn: int = 0
    last_grant_ms: int = 0
    last_used_ms: int = 0
    # idle, but kept for follow-ups until then
    held_until_ms: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """A model on its way to an executor's device."""

    model: str
    since_ms: int
    load_ms: int | None
    # it took the device from a model that was held or wanted: counts for the switch budget
    is_forced: bool


@dataclass(slots=True)
class LoadFailures:
    """Loads of a model that failed, in a row, and until when none is tried (failing.py)."""

    num: int = 0
    retry_ms: int = 0


@dataclass(slots=True)
class Failing:
    """A model of which loads failed since one worked last."""

    # why the last one did, for clients and operators
    message: str = ""
    # loads that their executors did not survive
    deaths: LoadFailures = field(default_factory=LoadFailures)
    # until it is known whether an executor that was lost died of it
    suspected_until_ms: int = 0
    # nobody could load it, and nobody tries before then; 0: somebody might
    refused_until_ms: int = 0


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
    # of offered models, as said or measured last
    load_ms: dict[str, int] = field(default_factory=dict)
    residences: dict[str, Residence] = field(default_factory=dict)
    loading: Load | None = None
    # of offered models
    failures: dict[str, LoadFailures] = field(default_factory=dict)
    # what it was loading when it was lost, if it was to be of use; None once it is back
    lost_load: str | None = None
    # no forced switch before then
    next_switch_ms: int = 0
    # None exactly while it is lost
    session: int | None = None
    is_draining: bool = False
    # the session that was told ExecutorDrained
    drained_session: int | None = None
    # held, being revoked and in doubt; all in doubt while it is lost, none while it is not
    leases: dict[LeaseKey, Lease] = field(default_factory=dict)
    # model -> how many of its leases are there; no zeros
    active: dict[str, int] = field(default_factory=dict)
    # sum of num_slots over leases held or being revoked
    num_leased: int = 0
    # sum of num_slots over leases in doubt
    num_in_doubt: int = 0
    # the sum of both: seats taken. Above num_slots only after capacity fell, or when it attached
    # with more
    num_used: int = 0
    reservation: Reservation | None = None
    # what each band earned here, in grants, each in [-1, 2]; empty until several bands waited
    band_credits: list[float] = field(default_factory=list)
    # the band that is owed most, if any is owed a whole grant (bands.py)
    owed_band: int | None = None
    activity: Activity = field(default_factory=Activity)

    @property
    def resident_models(self) -> tuple[str, ...]:
        """On the device, longest there first."""
        return tuple(self.residences)

    @property
    def num_free(self) -> int:
        """free + leased + in doubt = num_slots, unless more is used than there is: then 0."""
        num_free = self.num_slots - self.num_used
        return num_free if num_free > 0 else 0

    def num_kept_from(self, model: str) -> int:
        """Slots that a reservation keeps from this model, whoever of it asks."""
        reservation = self.reservation
        return 0 if reservation is None or reservation.model == model else reservation.num_kept

    @property
    def is_serving(self) -> bool:
        """New work may go there as far as slots allow."""
        return self.session is not None and not self.is_draining and self.num_slots > 0

    @property
    def has_memory(self) -> bool:
        """Another model would fit, if need be in place of what is idle; max_models may fall below
        what is resident."""
        return len(self.active) < self.max_models

    @property
    def num_to_leave(self) -> int:
        """Models that have to leave before another one comes; not above 0: none."""
        return len(self.residences) + 1 - self.max_models

    @property
    def is_roomy(self) -> bool:
        """It could begin to load a model that it has not, and has a slot for it."""
        return (
            self.num_free > 0
            and self.is_serving
            and self.loading is None
            and len(self.residences) < len(self.offered_models)
            and self.has_memory
        )

    def book(self, lease: Lease) -> None:
        """Enter a lease."""
        assert lease.key not in self.leases
        self.leases[lease.key] = lease
        self.active[lease.model] = self.active.get(lease.model, 0) + 1
        self.num_used += lease.num_slots
        if lease.state is LeaseState.IN_DOUBT:
            self.num_in_doubt += lease.num_slots
        else:
            self.num_leased += lease.num_slots

    def strike(self, lease: Lease) -> bool:
        """Give a lease's slots back and forget it; a second time changes nothing: False."""
        if self.leases.pop(lease.key, None) is None:
            return False
        self.active[lease.model] -= 1
        if not self.active[lease.model]:
            del self.active[lease.model]
        self.num_used -= lease.num_slots
        if lease.state is LeaseState.IN_DOUBT:
            self.num_in_doubt -= lease.num_slots
        else:
            self.num_leased -= lease.num_slots
        return True

    def move(self, lease: Lease, state: LeaseState) -> None:
        """Change a lease's state and with it the sum that its slots count in; enter it if new."""
        self.strike(lease)
        lease.state = state
        self.book(lease)
