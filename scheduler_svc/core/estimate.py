"""The one estimator: position, depth, ETA and Retry-After from the same numbers.

Rule: position = waiting requests that rank before this one (bands before, and in its band earlier
arrivals), counted over its pool: the models that share at least one serving executor with it.
Depth = all waiting requests of the pool. Two pools that overlap in part see each other's requests
whole, which errs on the honest side of late.

ETA = (position + 1) / rate. A model's rate is measured only while requests of it wait (otherwise
it would be the arrival rate): grants and the time they took, both fading with a half-life. The
pool's rate is the sum over its models that have somebody waiting. A rate counts once it was
measured for at least one mean lease, since before that the slots that happened to be free make
it look fast. Until then ETA = (position + 1) x mean lease in slot-seconds / slots of the pool;
with neither, or without a serving executor, nothing is known and nothing is claimed.
"""

from dataclasses import dataclass

from scheduler_svc.core.domain import CoreSettings, Lease, RequestRecord
from scheduler_svc.core.messages import RequestStatus
from scheduler_svc.core.placement import Fleet
from scheduler_svc.core.queue import Queue

_HALF_LIFE_MS = 30_000
# an ended lease weighs this much less with each later one
_LEASE_FADING = 0.95


@dataclass(slots=True)
class Meter:
    """What was measured of one model."""

    # grants out of a backlog and the backlogged time they took, fading together
    num_grants: float = 0.0
    backlogged_ms: float = 0.0
    # since when nothing was granted while requests waited; None while none waits
    since_ms: int | None = None
    # ended leases, their lengths and their lengths x slots, fading together
    num_leases: float = 0.0
    lease_ms: float = 0.0
    slot_ms: float = 0.0


class Estimator:
    """Measures grants and leases; answers where a request stands."""

    def __init__(self, settings: CoreSettings, queue: Queue, fleet: Fleet) -> None:
        self._settings = settings
        self._queue = queue
        self._fleet = fleet
        # oldest first; at most max_known_models
        self._meters: dict[str, Meter] = {}

    def backlog_began(self, model: str, now_ms: int) -> None:
        """The head of a model must wait; said again, it changes nothing."""
        meter = self._meter(model)
        if meter.since_ms is None:
            meter.since_ms = now_ms

    def backlog_ended(self, model: str) -> None:
        """Nobody waits for this model any more."""
        meter = self._meters.get(model)
        if meter is not None:
            meter.since_ms = None

    def granted(self, model: str, now_ms: int) -> None:
        """A request was granted; counts if it or another had to wait."""
        meter = self._meter(model)
        if meter.since_ms is None:
            return
        elapsed = now_ms - meter.since_ms
        fading = 0.5 ** (elapsed / _HALF_LIFE_MS)
        meter.num_grants = meter.num_grants * fading + 1
        meter.backlogged_ms = meter.backlogged_ms * fading + elapsed
        meter.since_ms = now_ms

    def ended(self, model: str, lease: Lease, now_ms: int) -> None:
        """An executor gave a lease's slots back."""
        meter = self._meter(model)
        elapsed = now_ms - lease.granted_ms
        meter.num_leases = meter.num_leases * _LEASE_FADING + 1
        meter.lease_ms = meter.lease_ms * _LEASE_FADING + elapsed
        meter.slot_ms = meter.slot_ms * _LEASE_FADING + elapsed * lease.num_slots

    def status(self, record: RequestRecord, now_ms: int) -> RequestStatus:
        """Where a live request stands."""
        model = record.request.model
        if record.lease is None:
            position = self._queue.num_before(record, self._fleet.pool(model).models)
            wait_ms = self.wait_ms(model, position)
        else:
            position = 0
            wait_ms = self._remaining_ms(model, record.lease, now_ms)
        return RequestStatus(
            is_running=record.lease is not None,
            position=position,
            depth=self._depth(model),
            estimated_wait_ms=wait_ms,
            retry_after_ms=self.clamp(wait_ms),
        )

    def wait_ms(self, model: str, position: int) -> int | None:
        """Time until a request with so many before it is granted, None if nothing is known."""
        pool = self._fleet.pool(model)
        if not pool.num_slots:
            return None
        meters = [self._meters[other] for other in pool.models if other in self._meters]
        num_leases = sum(meter.num_leases for meter in meters)
        mean_lease_ms = sum(meter.lease_ms for meter in meters) / num_leases if num_leases else 0.0
        rate = sum(
            meter.num_grants / meter.backlogged_ms
            for meter in meters
            if meter.since_ms is not None and meter.backlogged_ms > mean_lease_ms
        )
        if rate:
            return round((position + 1) / rate)
        if not num_leases:
            return None
        mean_slot_ms = sum(meter.slot_ms for meter in meters) / num_leases
        return round((position + 1) * mean_slot_ms / pool.num_slots)

    def retry_after_ms(self, model: str) -> int:
        """When one more request for a known model would find the present backlog gone."""
        return self.clamp(self.wait_ms(model, self._depth(model)))

    def clamp(self, wait_ms: int | None) -> int:
        """A wait as Retry-After; the minimum if it is not known."""
        limits = self._settings
        wanted = max(limits.retry_after_min_ms, wait_ms or 0)
        return min(wanted, limits.retry_after_max_ms)

    def _depth(self, model: str) -> int:
        return self._queue.num_waiting(self._fleet.pool(model).models)

    def _remaining_ms(self, model: str, lease: Lease, now_ms: int) -> int | None:
        meter = self._meters.get(model)
        if meter is None or not meter.num_leases:
            return None
        return max(0, round(meter.lease_ms / meter.num_leases) - (now_ms - lease.granted_ms))

    def _meter(self, model: str) -> Meter:
        meter = self._meters.get(model)
        if meter is None:
            if len(self._meters) >= self._settings.max_known_models:
                del self._meters[next(iter(self._meters))]
            meter = self._meters[model] = Meter()
        return meter
