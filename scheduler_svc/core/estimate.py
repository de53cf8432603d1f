"""The one estimator: position, depth, ETA and Retry-After from the same numbers.

Rule: position = waiting requests that go before this one, counted over its pool, the models that
share a home with it (without a home, its own model): all of earlier bands; of its own flow those
that fairness puts before it; of other flows of its band those with a smaller key (arrival, warm
models ahead by E: priority.py). Whoever stands behind a later arrival in its flow has its turn no
earlier than that one. Depth = all waiting requests of the pool. Two pools that overlap in part see
each other's requests whole, which errs on the honest side of late; so does not counting what bands
are owed.

A position never rises without a cause that the decision log names: "overtake" (an earlier band, a
tenant that had less service, a cache), "refund" (a tenant used less than it was charged),
"requeue", and what changes homes: "load", "resident", "reserve", "release".

ETA: a model's slots each take one of its requests every mean slot time of its leases, those that
are loading join when they come, and a model without a place waits for one first: until it is its
turn and an executor runs out of work (outlook.py). What that leaves out, tenants that overtake
and models that come and go, is a learned factor for each kind of estimate (calibration.py). A
model that was never measured borrows the mean of all; with none, or without a serving executor,
nothing is known and nothing is claimed. Means are of leases that ended: where somebody waits and
none of the pool began or ended for longer, those that run take so long at least. A model with a
limit waits for its own leases, one after another, if that takes longer.

The door (``measured_wait_ms``) asks for grants as they really came: a rate counts once it was
measured for at least one mean lease, since before that the slots that happened to be free make it
look fast.
"""

from typing import Final

from scheduler_svc.core import calibration, priority
from scheduler_svc.core.answers import RequestStatus
from scheduler_svc.core.calibration import Calibration, Kind
from scheduler_svc.core.domain import CoreSettings, Lease, RequestRecord
from scheduler_svc.core.fleet import Fleet
from scheduler_svc.core.message import message
from scheduler_svc.core.messages import Request
from scheduler_svc.core.meters import Meter
from scheduler_svc.core.outlook import Outlook
from scheduler_svc.core.queue import Queue

# a rate at the door is at most so old
_DOOR_RATE_MS: Final = 100
# "surely": this many times the mean time for a token, and for a lease to begin
_SAFETY: Final = 2.0


@message(frozen=True, slots=True)
class Ahead:
    """How many go before a request, how many of them are of its own flow and tenant, and how many
    of its model."""

    num: int
    num_own: int
    num_of_model: int


class Estimator:
    """Measures grants and leases; answers where a request stands."""

    def __init__(self, settings: CoreSettings, queue: Queue, fleet: Fleet) -> None:
        self._settings = settings
        self._queue = queue
        self._fleet = fleet
        # of known models only
        self._meters: dict[str, Meter] = {}
        # known model -> (measured at, rate of its pool)
        self._door_rates: dict[str, tuple[int, float]] = {}
        # of all models together
        self._all = Meter()
        self._calibration = Calibration()
        self._outlook = Outlook(queue, fleet, self._some_slot_ms, self._due_ms)

    # --- events -------------------------------------------------------------------------

    def accepted(self, record: RequestRecord, now_ms: int) -> None:
        """A request joined the queue: remember now and then what its estimate would be."""
        model = record.request.model
        # a place is dear: it is asked for only where it will be of use
        if self._calibration.wants_sample(now_ms) and self._is_known(model, now_ms):
            raw = self._raw(model, self.ahead(record), now_ms)
            assert raw is not None
            self._calibration.predicted(record.arrival, raw[0], raw[1], now_ms)

    def backlog_began(self, model: str, now_ms: int) -> None:
        """The head of a model must wait; said again, it changes nothing."""
        meter = self._meter(model)
        if meter.since_ms is None:
            meter.since_ms = now_ms
        if meter.placeless_since_ms is None and not self._fleet.warmth(model):
            meter.placeless_since_ms = now_ms

    def backlog_ended(self, model: str) -> None:
        """Nobody waits for this model any more."""
        meter = self._meters.get(model)
        if meter is not None:
            meter.since_ms = meter.placeless_since_ms = None

    def placed(self, model: str) -> None:
        """A load of the model began: it has a place."""
        self._meter(model).placeless_since_ms = None

    def granted(self, record: RequestRecord, now_ms: int) -> None:
        """A request was granted."""
        self._meter(record.request.model).granted(now_ms)
        self._calibration.granted(record.arrival, now_ms)

    def ended(self, model: str, lease: Lease, num_tokens: int, now_ms: int) -> None:
        """An executor gave a lease's slots back; ``num_tokens`` were generated, all samples."""
        self._meter(model).ended(lease, num_tokens, now_ms)
        self._all.ended(lease, num_tokens, now_ms)

    def forget(self, model: str) -> None:
        """A model is not known any more; nobody waits for it."""
        self._meters.pop(model, None)
        self._door_rates.pop(model, None)

    # --- questions ----------------------------------------------------------------------

    def mean_lease_ms(self, model: str) -> float | None:
        """How long a lease of this model takes; None if none ended."""
        meter = self._meters.get(model)
        return meter.lease_ms / meter.num_leases if meter is not None and meter.num_leases else None

    def placeless_ms(self, model: str, now_ms: int) -> int:
        """How long requests of a model wait while it has no place."""
        meter = self._meters.get(model)
        since_ms = None if meter is None else meter.placeless_since_ms
        return 0 if since_ms is None else now_ms - since_ms

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
        if record.lease is None:
            return self.waiting(record, self.ahead(record), now_ms)
        model = record.request.model
        wait_ms = self._remaining_ms(model, record.lease, now_ms)
        return RequestStatus(True, 0, self.depth(model), wait_ms, self.clamp(wait_ms))

    def waiting(self, record: RequestRecord, ahead: Ahead, now_ms: int) -> RequestStatus:
        """Where a waiting request stands that these go before."""
        model = record.request.model
        wait_ms = self._wait_ms(model, ahead, now_ms)
        return RequestStatus(False, ahead.num, self.depth(model), wait_ms, self.clamp(wait_ms))

    def ahead(self, record: RequestRecord) -> Ahead:
        """Who goes before a waiting request, or may if others give up."""
        request = record.request
        place = self._queue.bands[request.band][request.model].place(record)
        shifts = self._shifts(request)
        num = self._queue.num_before(request.band, request.model, place, shifts)
        return Ahead(num, place.num_own, self._queue.num_before_in_model(request, place))

    def position_of_new(self, request: Request, arrival: int) -> int:
        """How many would go before a request that is not there yet."""
        place = self._queue.place_of_new(request, arrival)
        return self._queue.num_before(request.band, request.model, place, self._shifts(request))

    def _shifts(self, request: Request) -> dict[str, int]:
        warmth = self._fleet.pool(request.model).warmth
        return {model: priority.shift(self._settings, warm) for model, warm in warmth.items()}

    def _wait_ms(self, model: str, ahead: Ahead, now_ms: int) -> int | None:
        """Time until a request with these before it is granted; None if nothing is known."""
        raw = self._raw(model, ahead, now_ms)
        return None if raw is None else self._calibration.corrected(*raw)

    def _is_known(self, model: str, now_ms: int) -> bool:
        """Whether anything can be said about a wait for this model."""
        if self._mean_slot_ms(model) is None:
            return False
        _, num_slots, coming = self._places(model, now_ms)
        return num_slots > 0 or bool(coming)

    def _raw(self, model: str, ahead: Ahead, now_ms: int) -> tuple[Kind, float] | None:
        """The same before correction, and what it was made of."""
        slot_ms = self._mean_slot_ms(model)
        if slot_ms is None:
            return None
        situation, num_slots, coming = self._places(model, now_ms)
        if not num_slots and not coming:
            return None
        least_ms = max(1, self._unmoved_ms(model, now_ms) if num_slots else 0)
        raw_ms = _served_in_ms(ahead.num + 1, max(least_ms, slot_ms), num_slots, coming)
        limit = self._settings.model_limits.get(model)
        if limit is not None:  # of its leases, whatever goes on beside them
            lease_ms = self.mean_lease_ms(model) or slot_ms
            raw_ms = max(raw_ms, (ahead.num_of_model + 1) * max(least_ms, lease_ms) / limit)
        return calibration.kind(situation, ahead.num, ahead.num_own), raw_ms

    def _places(self, model: str, now_ms: int) -> tuple[str, int, list[tuple[float, int]]]:
        """How it stands with a model's places, its slots, and the slots that come: in so long,
        so many."""
        fleet = self._fleet
        num_slots = fleet.pool(model).num_slots if model in fleet.homes else 0
        coming: list[tuple[float, int]] = []
        for executor in fleet.loading.get(model, {}).values():
            load = executor.loading
            assert load is not None
            left_ms = load.since_ms + (load.load_ms or 0) - now_ms
            coming.append((max(0, left_ms), executor.num_slots))
        if num_slots or coming:
            return calibration.HOME if num_slots else "loading", num_slots, sorted(coming)
        load_ms = fleet.offer(model).load_ms or 0
        reservation = fleet.reservations.get(model)
        if reservation is not None:
            left_ms = max(0, reservation.expected_ms - now_ms)
            num_slots = fleet.executors[reservation.executor_id].num_slots
            return "drain", 0, [(left_ms + load_ms, num_slots)]
        num_slots = fleet.pool(model).num_largest
        if not num_slots:
            return "none", 0, []
        return "none", 0, [(self._outlook.place_in_ms(model, now_ms) + load_ms, num_slots)]

    def _due_ms(self, model: str, now_ms: int) -> int:
        """For how long a model waits for a place, if its turn comes by that; else 0."""
        placeless_ms = self.placeless_ms(model, now_ms)
        return placeless_ms if placeless_ms >= self._settings.aging_equalization_ms else 0

    def measured_wait_ms(self, model: str, position: int, now_ms: int) -> int | None:
        """The same without what a cold model adds, from a measured rate only, and the better one
        of two, since a lull must not close the door: grants as they came, and slots over the mean
        lease. For the door, where every request asks: measured anew after a while only."""
        known = self._door_rates.get(model)
        if known is None or now_ms - known[0] >= _DOOR_RATE_MS:
            known = self._door_rates[model] = (now_ms, self._door_rate(model))
        return round((position + 1) / known[1]) if known[1] else None

    def _door_rate(self, model: str) -> float:
        rate, mean_slot_ms = self._rate(model)
        if not rate or not mean_slot_ms:
            return rate
        return max(rate, self._fleet.pool(model).num_slots / mean_slot_ms)

    def _mean_slot_ms(self, model: str) -> float | None:
        """Mean slot-milliseconds of a lease: the model's, or until one ended that of all."""
        meter = self._meters.get(model)
        if meter is None or not meter.num_leases:
            meter = self._all
        return meter.slot_ms / meter.num_leases if meter.num_leases else None

    def _unmoved_ms(self, model: str, now_ms: int) -> int:
        """For how long no lease of a model's pool began or ended, though somebody waits there."""
        pool = self._fleet.pool(model).warmth
        if not self._queue.num_waiting(pool):
            return 0
        moved_ms = [self._meters[other].moved_ms for other in pool if other in self._meters]
        return now_ms - max(moved_ms, default=now_ms)

    def _some_slot_ms(self, model: str) -> float:
        return self._mean_slot_ms(model) or 0.0

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

    def retry_after_ms(self, model: str, now_ms: int) -> int:
        """When one more request for a known model would find the present backlog gone."""
        ahead = Ahead(self.depth(model), 0, self._queue.num_waiting((model,)))
        return self.clamp(self._wait_ms(model, ahead, now_ms))

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
            meter = self._meters[model] = Meter()
        return meter


def _served_in_ms(
    num_requests: int, slot_ms: float, num_slots: int, coming: list[tuple[float, int]]
) -> float:
    """When the last of so many requests gets a slot, each of which takes ``slot_ms`` of one.

    All ``num_slots`` are taken now, and one becomes free each slot_ms / num_slots; the slots that
    come are free when they do. ``coming``: (in how many ms, slots), soonest first.
    """
    at_ms, left = 0.0, float(num_requests)
    for come_ms, num_more in coming:
        served = (come_ms - at_ms) * num_slots / slot_ms
        if served >= left:
            break
        at_ms, left = come_ms, left - served - num_more
        if left <= 0:
            return at_ms
        num_slots += num_more
    return at_ms + left * slot_ms / num_slots
