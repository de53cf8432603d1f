"""Whose turn it is to be tried: ranks, and the models that are awake.

Rule: placement does not look through the queue. Whatever may let a model's head go (a new head,
free slots, room for a load, a reservation that ended, time) wakes that model; placement tries the
heads of models that are awake, best first, and no others. A model that is not awake has no head,
or has one that is known to have no place.
"""

from collections.abc import Iterable
from typing import Final

from scheduler_svc.core import priority
from scheduler_svc.core.bands import Shares
from scheduler_svc.core.domain import CoreSettings, ExecutorRecord, Rank, RequestRecord
from scheduler_svc.core.estimate import Estimator
from scheduler_svc.core.fleet import Fleet
from scheduler_svc.core.nowhere import Nowhere
from scheduler_svc.core.queue import Queue

# who goes before everybody of the first band, and who after everybody
OWED: Final = -1
_LAST: Final = 1 << 30
_BITS: Final = priority.ARRIVAL_BITS


class Waking:
    """The models that are awake, and the order in which their heads are tried."""

    def __init__(
        self, settings: CoreSettings, queue: Queue, fleet: Fleet, estimator: Estimator
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._fleet = fleet
        self._estimator = estimator
        self.shares = Shares(settings)
        # when the event in hand happened
        self.now_ms = 0
        # the executor whose slots are given out: what it owes a band counts
        self.contested: ExecutorRecord | None = None
        # waiting models: what their warmth or their claim is worth (``_bonus``), and the first band
        # that was tried already
        self.awake: dict[str, tuple[int, int]] = {}
        self._nowhere = Nowhere(queue, fleet)
        self._full_bonus = priority.shift(settings, 1.0)
        self._band_limits_ms = priority.band_limits_ms(settings)
        # heads that arrived before this are overdue, by band; and when that was so
        self._limits: list[int] = []
        self._limits_of_ms = -1

    def rank(self, head: RequestRecord) -> Rank:
        """Its place in the grant order, as things are now; it goes first in its flow, or may.

        Who is overdue counts as of band 0 though nobody waits there yet: what is reserved for it
        must hold against who comes.
        """
        band, model = head.request.band, head.request.model
        standing = self._queue.flows[model][band].standing
        if standing < self.overdue_before(self.now_ms)[band]:
            band = 0
        return band, standing - priority.shift(self._settings, self._fleet.warmth(model))

    def wake(self, model: str) -> None:
        """Have placement try the model's heads."""
        flows = self._queue.flows.get(model)
        if flows is None:
            return
        if self.is_hopeless(model):
            self._estimator.backlog_began(model, self.now_ms)
            return
        self.awake[model] = self._bonus(model), self._settings.num_bands

    def _bonus(self, model: str) -> int:
        """By how much its heads go before their arrival: warm ones that find room by the bonus,
        those that need a place by the model's claim to one."""
        fleet = self._fleet
        if self._settings.is_fifo:
            return 0
        if fleet.has_usable(model):
            return self._full_bonus
        head = self._queue.head(model)
        assert head is not None
        num_places = len(fleet.homes.get(model, ())) + len(fleet.loading.get(model, ()))
        standing = self._queue.flows[model][head.request.band].standing
        return priority.claim(
            self._settings,
            self.now_ms - head.accepted_ms + (head.arrival - standing >> _BITS),
            self._queue.waited_ms(model, self.now_ms),
            num_places,
            self._due_ms(head),
        )

    def _due_ms(self, head: RequestRecord) -> int:
        """For how long a model without a place has had somebody to serve: as long as its head
        waits, or its oldest request does, less E."""
        model = head.request.model
        placeless_ms = self._estimator.placeless_ms(model, self.now_ms)
        oldest_ms = min(placeless_ms, self.now_ms - self._queue.oldest_ms(model))
        return max(
            min(placeless_ms, self.now_ms - head.accepted_ms),
            oldest_ms - self._settings.aging_equalization_ms,
        )

    def is_hopeless(self, model: str) -> bool:
        """Whether trying the heads of a waiting model would change nothing: it has homes, all are
        full, and nothing can be loaded or kept for it. Spares placement most of its work."""
        fleet = self._fleet
        if model not in fleet.homes or fleet.has_usable(model) or fleet.reservations:
            return False
        head = self._queue.head(model)
        return head is not None and head.request.num_samples == 1 and not fleet.has_open(model)

    def sleep_hopeless(self, executor: ExecutorRecord) -> None:
        """An executor is full: whoever was woken for its slots has nothing to look for."""
        for model in executor.residences:
            if model in self.awake and self.is_hopeless(model):
                self._estimator.backlog_began(model, self.now_ms)
                del self.awake[model]

    def wake_residents(self, executor: ExecutorRecord) -> None:
        """Have placement try the models that wait and are resident on an executor that serves and
        has room for them."""
        flows, value = self._queue.flows, (self._full_bonus, self._settings.num_bands)
        self.contested = executor
        for model in executor.residences:
            if model in flows:
                self.awake[model] = value

    def wake_waiting(self, executor: ExecutorRecord) -> None:
        """Have placement try the models that wait and could be loaded on a roomy executor: those
        that have no place, and if it is open those that have one too."""
        waiting, offered = self._queue.num_by_model, executor.offered_models
        candidates: Iterable[str] = self._nowhere.models()
        if self._fleet.is_open(executor):
            candidates = waiting if len(waiting) < len(offered) else offered
        for model in candidates:
            if model in waiting and model in offered and model not in executor.residences:
                self.wake(model)

    def wake_nowhere(self, executor: ExecutorRecord) -> None:
        """Have placement try the models without a place: the executor may have come to be one that
        could be drained for them."""
        for model in self._nowhere.models():
            if model in executor.offered_models:
                self.wake(model)

    def wake_instead(self, unwanted: str) -> None:
        """Nobody waits for a model any more: have placement try those that could take its place."""
        asleep = dict(self._queue.num_by_model)
        for executor in self._fleet.roomy_with(unwanted) if asleep else ():
            offered, residences = executor.offered_models, executor.residences
            is_open = self._fleet.is_open(executor)
            for model in list(asleep) if is_open else self._nowhere.models():
                if model in asleep and model in offered and model not in residences:
                    del asleep[model]
                    self.wake(model)
            if not asleep:
                return

    def could_load(self, executor: ExecutorRecord) -> bool:
        """Whether a model that waits and is nowhere could be loaded on a roomy executor."""
        return not executor.offered_models.isdisjoint(self._nowhere.models())

    def sleep(self, head: RequestRecord) -> None:
        """A head found no place, so nothing behind it in its model is tried either."""
        model, band = head.request.model, head.request.band
        awake = self.awake.get(model)
        if awake is not None:
            if band > min(self._queue.flows[model]):
                self.awake[model] = awake[0], band
            else:
                del self.awake[model]

    def next_awake(self) -> RequestRecord | None:
        """The head to try next: of a band that is owed a grant where slots are given out, then of
        the first band, in which the overdue ones of later bands count. Few models are awake at a
        time, so they are looked through."""
        if not self.awake:
            return None
        flows_of, contested = self._queue.flows, self.contested
        first, limits = self._first_band(), self.overdue_before(self.now_ms)
        owed = None if contested is None else contested.owed_band
        best_turn, best_key, best = _LAST, 0, 0
        found: RequestRecord | None = None
        for model, (bonus, below) in self.awake.items():
            for band, flow in flows_of[model].items():
                if band >= below:
                    continue
                standing = flow.standing
                turn = first if standing < limits[band] else band
                if band == owed and contested is not None and model in contested.residences:
                    turn = OWED
                key = standing - bonus
                if turn < best_turn or (
                    turn == best_turn and (key < best_key or (key == best_key and standing < best))
                ):
                    best_turn, best_key, best, found = turn, key, standing, flow.first
        assert found is not None
        return found

    def next_resident(self, executor: ExecutorRecord) -> RequestRecord | None:
        """The head that would be next if just the models that are resident on an executor were
        awake, all of them warm."""
        flows_of, owed, found = self._queue.flows, executor.owed_band, None
        owed_band = -1 if owed is None else owed
        first, limits = -1, self.overdue_before(self.now_ms)
        best_turn, best = _LAST, 0
        for model in executor.residences:
            flows = flows_of.get(model)
            if flows is None:
                continue
            if first < 0:
                first = self._first_band()
            for band, flow in flows.items():
                standing = flow.standing
                turn = OWED if band == owed_band else first if standing < limits[band] else band
                if turn < best_turn or (turn == best_turn and standing < best):
                    best_turn, best, found = turn, standing, flow.first
        return found

    def owing(self, head: RequestRecord) -> ExecutorRecord | None:
        """The executor whose slots are given out, if it owes a grant to the band of a head whose
        model it has."""
        contested, request = self.contested, head.request
        if contested is None or contested.owed_band != request.band:
            return None
        return contested if request.model in contested.residences else None

    def overdue_before(self, now_ms: int) -> list[int]:
        """By band: a head that stands before this has waited longer than its band's limit."""
        if self._limits_of_ms != now_ms:
            self._limits_of_ms = now_ms
            self._limits = [now_ms + 1 - limit << _BITS for limit in self._band_limits_ms]
        return self._limits

    def _first_band(self) -> int:
        """The first band in which somebody waits; somebody does."""
        band, bands = 0, self._queue.bands
        while not bands[band]:
            band += 1
        return band

    def forget(self, model: str) -> None:
        """Nothing is to be tried for it any more, or everything anew."""
        self.awake.pop(model, None)
