"""The one estimator: position, depth, ETA and Retry-After from the same numbers.

Rule: position = waiting requests that go before this one, counted over its pool, the models that
share a home with it: all of earlier bands; of its own flow those that fairness puts before it; of
other flows of its band those with a smaller key (arrival, warm models ahead by E: priority.py).
Whoever stands behind a later arrival in its flow has its turn no earlier than that one. Depth =
all waiting requests of the pool. Two pools that overlap in part see each other's requests whole,
which errs on the honest side of late; so does not counting what bands are owed.

A position never rises except for: requests of earlier bands, requests that came back, tenants of
the flow that had less service, models that became warmer, and executors that came or went. The
first three are counted as decisions ("position_rose.*").

ETA = (position + 1) / rate. A model's rate is measured only while requests of it wait (otherwise
it would be the arrival rate): grants and the time they took, both fading with a half-life. The
pool's rate is the sum over its models that have somebody waiting. A rate counts once it was
measured for at least one mean lease, since before that the slots that happened to be free make
it look fast. Until then ETA = (position + 1) x mean lease in slot-seconds / slots of the pool;
with neither, or without a serving executor, nothing is known and nothing is claimed. A model that
has no home waits in addition for its load (what is left of it), and before that for a drain.
"""

from dataclasses import dataclass

from scheduler_svc.core import priority
from scheduler_svc.core.domain import CoreSettings, Lease, RequestRecord
from scheduler_svc.core.fleet import Fleet
from scheduler_svc.core.messages import Request, RequestStatus
from scheduler_svc.core.queue import Queue

_HALF_LIFE_MS = 30_000
# an ended lease weighs this much less with each later one
_LEASE_FADING = 0.95
# a rate at the door is at most so old
_DOOR_RATE_MS = 100
# "surely": this many times the mean time for a token, and for a lease to begin
_SAFETY = 2.0


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
    # completed leases: time, and tokens of their longest possible sample, fading together
    decode_ms: float = 0.0
    num_decoded: float = 0.0


class Estimator:
    """Measures grants and leases; answers where a request stands."""

    def __init__(self, settings: CoreSettings, queue: Queue, fleet: Fleet) -> None:
        self._settings = settings
        self._queue = queue
        self._fleet = fleet
        # oldest first; at most max_known_models
        self._meters: dict[str, Meter] = {}
        # model -> (measured at, rate of its pool); at most max_known_models
        self._door_rates: dict[str, tuple[int, float]] = {}

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

    def ended(self, model: str, lease: Lease, num_tokens: int, now_ms: int) -> None:
        """An executor gave a lease's slots back; ``num_tokens`` were generated, all samples."""
        meter = self._meter(model)
        elapsed = now_ms - lease.granted_ms
        meter.num_leases = meter.num_leases * _LEASE_FADING + 1
        meter.lease_ms = meter.lease_ms * _LEASE_FADING + elapsed
        meter.slot_ms = meter.slot_ms * _LEASE_FADING + elapsed * lease.num_slots
        if num_tokens:
            meter.decode_ms = meter.decode_ms * _LEASE_FADING + elapsed
            meter.num_decoded = meter.num_decoded * _LEASE_FADING + num_tokens / lease.num_slots

    def mean_lease_ms(self, model: str) -> float | None:
        """How long a lease of this model takes; None if none ended."""
        meter = self._meters.get(model)
        return meter.lease_ms / meter.num_leases if meter is not None and meter.num_leases else None

    def longest_ms(self, request: Request) -> int | None:
        """A lease of this request surely ends within; None if its model was not measured."""
        meter = self._meters.get(request.model)
        if meter is None or not meter.num_decoded:
            return None
        return round(_SAFETY * request.max_tokens * meter.decode_ms / meter.num_decoded)

    def drain_ms(self, model: str, num_requests: int) -> int | None:
        """Time in which the homes of a model serve so many of its requests; None if unknown."""
        meter = self._meters.get(model)
        if meter is None or not meter.num_leases:
            return None
        num_slots = self._fleet.pool(model).num_slots
        mean_slot_ms = meter.slot_ms / meter.num_leases
        return round(num_requests * mean_slot_ms / num_slots) if num_slots else None

    def status(self, record: RequestRecord, now_ms: int) -> RequestStatus:
        """Where a live request stands."""
        model = record.request.model
        if record.lease is None:
            position = self.position(record)
            wait_ms = self.wait_ms(model, position, now_ms, record.accepted_ms)
        else:
            position = 0
            wait_ms = self._remaining_ms(model, record.lease, now_ms)
        return RequestStatus(
            is_running=record.lease is not None,
            position=position,
            depth=self.depth(model),
            estimated_wait_ms=wait_ms,
            retry_after_ms=self.clamp(wait_ms),
        )

    def position(self, record: RequestRecord) -> int:
        """How many go before a waiting request."""
        request = record.request
        place = self._queue.bands[request.band][request.model].place(record)
        return self._queue.num_before(request.band, request.model, place, self._shifts(request))

    def position_of_new(self, request: Request, arrival: int) -> int:
        """How many would go before a request that is not there yet."""
        place = self._queue.place_of_new(request, arrival)
        return self._queue.num_before(request.band, request.model, place, self._shifts(request))

    def _shifts(self, request: Request) -> dict[str, int]:
        warmth = self._fleet.pool(request.model).warmth
        return {model: priority.shift(self._settings, warm) for model, warm in warmth.items()}

    def wait_ms(self, model: str, position: int, now_ms: int, since_ms: int) -> int | None:
        """Time until a request that waits since then, with so many before it, is granted; None
        if nothing is known."""
        queued_ms = self._queued_ms(model, position)
        if queued_ms is None or model in self._fleet.homes:
            return queued_ms
        return queued_ms + self._cold_ms(model, now_ms, since_ms)

    def measured_wait_ms(self, model: str, position: int, now_ms: int) -> int | None:
        """The same without what a cold model adds, from a measured rate only, and the better one
        of two, since a lull must not close the door: grants as they came, and slots over the mean
        lease. For the door, where every request asks: measured anew after a while only."""
        known = self._door_rates.get(model)
        if known is None or now_ms - known[0] >= _DOOR_RATE_MS:
            if len(self._door_rates) >= self._settings.max_known_models:
                self._door_rates.clear()
            known = self._door_rates[model] = (now_ms, self._door_rate(model))
        return round((position + 1) / known[1]) if known[1] else None

    def _door_rate(self, model: str) -> float:
        rate, mean_slot_ms = self._rate(model)
        if not rate or not mean_slot_ms:
            return rate
        return max(rate, self._fleet.pool(model).num_slots / mean_slot_ms)

    def _queued_ms(self, model: str, position: int) -> int | None:
        num_slots = self._fleet.pool(model).num_slots
        if not num_slots:
            return None
        rate, mean_slot_ms = self._rate(model)
        if rate:
            return round((position + 1) / rate)
        if mean_slot_ms is None:
            return None
        return round((position + 1) * mean_slot_ms / num_slots)

    def _rate(self, model: str) -> tuple[float, float | None]:
        """(grants in a millisecond, mean slot-milliseconds of a lease) of a model's pool."""
        meters = [
            self._meters[other] for other in self._fleet.pool(model).warmth if other in self._meters
        ]
        num_leases = sum(meter.num_leases for meter in meters)
        if not num_leases:
            return 0.0, None
        mean_lease_ms = sum(meter.lease_ms for meter in meters) / num_leases
        rate = sum(
            meter.num_grants / meter.backlogged_ms
            for meter in meters
            if meter.since_ms is not None and meter.backlogged_ms > mean_lease_ms
        )
        return rate, sum(meter.slot_ms for meter in meters) / num_leases

    def _cold_ms(self, model: str, now_ms: int, since_ms: int) -> int:
        """What is left of the load, or the drain that comes first and the whole load."""
        fleet = self._fleet
        for executor in fleet.loading.get(model, {}).values():
            load = executor.loading
            assert load is not None
            return max(0, load.since_ms + (load.load_ms or 0) - now_ms)
        load_ms = fleet.offer(model).load_ms or 0
        reservation = fleet.reservations.get(model)
        if reservation is not None:
            return load_ms + max(0, reservation.expected_ms - now_ms)
        return load_ms + max(0, since_ms + self._settings.aging_equalization_ms - now_ms)

    def retry_after_ms(self, model: str, now_ms: int) -> int:
        """When one more request for a known model would find the present backlog gone."""
        return self.clamp(self.wait_ms(model, self.depth(model), now_ms, now_ms))

    def clamp(self, wait_ms: int | None) -> int:
        """A wait as Retry-After; the minimum if it is not known."""
        limits = self._settings
        wanted = max(limits.retry_after_min_ms, wait_ms or 0)
        return min(wanted, limits.retry_after_max_ms)

    def depth(self, model: str) -> int:
        """How many wait in the model's pool."""
        return self._queue.num_waiting(self._fleet.pool(model).warmth)

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
