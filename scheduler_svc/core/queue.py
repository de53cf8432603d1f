"""The bounded queue: band -> model -> tenant -> requests by arrival.

Rule: who waits is here and nowhere else. A flow is one (band, model). Inside a flow the tenant
with the smallest virtual time goes next (fairness.py), ties by arrival, and of a tenant the oldest
request. What was granted before and came back goes first in its flow, by arrival: its tenant paid
for it already, and nobody who was behind it is granted while it waits.

Cost: add, remove and head are O(log n) of their flow, whatever waits in others (flow.py).

Bounds are checked at the door only (``has_room``), where a later band finds the queue full a little
earlier than those before it (band_queue_shares), so that it cannot shut them out, however much
comes. What goes back was accepted and is never refused, so after losses more may wait than a new
request would find room for; the whole is still bounded by max_inflight.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil

from scheduler_svc.core import priority
from scheduler_svc.core.domain import CoreSettings, RequestRecord
from scheduler_svc.core.fairness import Fairness
from scheduler_svc.core.flow import Flow, Place
from scheduler_svc.core.messages import Request

# (key, standing, arrival, request): who goes next in a flow, by rank in its band
_Head = tuple[int, int, int, RequestRecord]


class Queue:
    """All waiting requests."""

    def __init__(self, settings: CoreSettings) -> None:
        self._settings = settings
        self._room = _room_by_band(settings)
        self._num_waiting = 0
        # by band; no empty flows
        self.bands: list[dict[str, Flow]] = [{} for _ in range(settings.num_bands)]
        # the same by model -> band
        self.flows: dict[str, dict[int, Flow]] = {}
        # model -> how many wait; no zeros
        self.num_by_model: dict[str, int] = {}
        # model -> sum of accepted_ms over them, so that the sum of their waits is one product away
        self.accepted_ms_by_model: dict[str, int] = {}
        self.fairness = Fairness(
            settings.tenant_weights, settings.locality_quantum_tokens, settings.max_fair_accounts
        )
        # counts up when a model begins or ceases to wait
        self.version = 0
        # sums over the waiting
        self.num_tokens = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __contains__(self, record: RequestRecord) -> bool:
        flow = self.bands[record.request.band].get(record.request.model)
        return flow is not None and record in flow

    def has_room(self, request: Request) -> bool:
        """Whether one more stays within the bounds on requests, tokens and bytes, or within its
        band's share of them."""
        max_requests, max_tokens, max_bytes = self._room[request.band]
        return (
            self._num_waiting < max_requests
            and self.num_tokens + request.num_tokens <= max_tokens
            and self.num_bytes + request.num_bytes <= max_bytes
        )

    def cost(self, request: Request) -> int:
        """Tokens that fairness charges for it: output costs more than prompt."""
        num_output = request.max_tokens * request.num_samples
        return request.num_prompt_tokens + self._settings.output_token_weight * num_output

    def add(self, record: RequestRecord) -> None:
        """Start or go on waiting, at the place that the rules give."""
        self._num_waiting += 1
        request = record.request
        model = request.model
        flows = self.bands[request.band]
        flow = flows.get(model)
        if flow is None:
            flow = flows[model] = Flow((request.band, model), self.fairness, self._settings)
            self.flows.setdefault(model, {})[request.band] = flow
        flow.add(record, self.cost(request))
        num = self.num_by_model.get(model, 0)
        self.num_by_model[model] = num + 1
        self.version += not num
        since_ms = self.accepted_ms_by_model.get(model, 0)
        self.accepted_ms_by_model[model] = since_ms + record.accepted_ms
        self.num_tokens += request.num_tokens
        self.num_bytes += request.num_bytes

    def remove(self, record: RequestRecord, key: float | None = None) -> None:
        """Stop waiting; ``key``: the new virtual time of its tenant, if it changes."""
        self._num_waiting -= 1
        request = record.request
        model = request.model
        flows = self.bands[request.band]
        flow = flows[model]
        flow.remove(record, key)
        if not len(flow.everybody):
            del flows[model]
            del self.flows[model][request.band]
        self.num_by_model[model] -= 1
        self.accepted_ms_by_model[model] -= record.accepted_ms
        if not self.num_by_model[model]:
            del self.num_by_model[model], self.accepted_ms_by_model[model], self.flows[model]
            self.version += 1
        self.num_tokens -= request.num_tokens
        self.num_bytes -= request.num_bytes

    def take(self, record: RequestRecord, now_ms: int) -> None:
        """It was granted or adopted: its tenant pays what it may use, and it waits no longer."""
        request = record.request
        record.num_charged_tokens = cost = self.cost(request)
        name = (request.band, request.model)
        self.bands[request.band][request.model].last_turn = now_ms * priority.ARRIVALS_PER_MS
        self.remove(record, self.fairness.charge(name, request.tenant, cost))

    def settle(self, record: RequestRecord, num_used_tokens: int) -> None:
        """Its lease ended: what it was charged becomes what it used; once for each charge."""
        if record.num_charged_tokens:
            request = record.request
            name, charged = (request.band, request.model), record.num_charged_tokens
            used = min(num_used_tokens, charged)
            key = self.fairness.correct(name, request.tenant, charged, used)
            record.num_charged_tokens = 0
            flow = self.bands[request.band].get(request.model)
            if flow is not None:
                flow.charged(request.tenant, key)

    def waited_ms(self, model: str, now_ms: int) -> int:
        """Sum of the waits of a model's requests until now."""
        num_waiting = self.num_by_model.get(model, 0)
        return num_waiting * now_ms - self.accepted_ms_by_model.get(model, 0)

    def oldest_ms(self, model: str) -> int:
        """When the oldest request of a model that waits was accepted; that need not be its head."""
        return min([flow.oldest_ms() for flow in self.flows[model].values()])

    def head(self, model: str) -> RequestRecord | None:
        """The request of a model that goes first; None if none waits."""
        flows = self.flows.get(model)
        return None if flows is None else flows[min(flows)].first

    def head_of(self, band: int, model: str) -> RequestRecord | None:
        """Who goes first in a flow."""
        flow = self.bands[band].get(model)
        return None if flow is None else flow.first

    def is_head(self, record: RequestRecord) -> bool:
        """Whether a live request goes next in its flow."""
        return self.head_of(record.request.band, record.request.model) is record

    def is_anybody_after(self, band: int) -> bool:
        """Whether somebody waits in a later band."""
        later = len(self.bands) - 1
        while later > band and not self.bands[later]:
            later -= 1
        return later > band

    def has_several_bands(self) -> bool:
        """Whether somebody waits in more than one band."""
        num = 0
        for flows in self.bands:
            if flows:
                num += 1
        return num > 1

    def num_waiting(self, models: Iterable[str]) -> int:
        """How many wait for any of these models."""
        return sum(self.num_by_model.get(model, 0) for model in models)

    def place_of_new(self, request: Request, arrival: int) -> Place:
        """Where a request would stand in its flow if it came now."""
        flow = self.bands[request.band].get(request.model)
        return Place(0, arrival) if flow is None else flow.place_of_new(request.tenant, arrival)

    def num_before(self, band: int, model: str, place: Place, shifts: dict[str, int]) -> int:
        """How many go before whoever stands at ``place`` of a flow.

        ``shifts``: for each model to count, what its warmth is worth; the flow's own among them.
        """
        count = place.num_before
        key = place.turn - shifts[model]
        for other, shift in shifts.items():
            if other not in self.num_by_model:
                continue
            for flows in self.bands[:band]:
                if other in flows:
                    count += len(flows[other].everybody)
            if other != model and other in self.bands[band]:
                # of equal keys the earlier arrival goes first: that of the colder model
                ties = 1 if shift < shifts[model] else 0
                count += self.bands[band][other].everybody.count_before(key + shift + ties)
        return count

    def num_before_in_model(self, request: Request, place: Place) -> int:
        """How many of its own model go before whoever stands at ``place`` of its flow."""
        flows = self.flows[request.model]
        return place.num_before + sum(
            len(flow.everybody) for band, flow in flows.items() if band < request.band
        )

    def in_order(
        self, shifts: Mapping[str, int], overdue_before: Sequence[int]
    ) -> Iterator[RequestRecord]:
        """All waiting requests as they will be granted; lazy, so that the first few cost little.

        ``shifts``: what the warmth of models is worth. ``overdue_before``: by band, heads that
        stand before it count as of the first band that waits. What bands are owed is left out: it
        differs from executor to executor.
        """
        # by band, and of all bands who is overdue there; heads of flows
        waiting: list[list[_Head]] = [[] for _ in self.bands]
        overdue: list[_Head] = []
        num_overdue = [0] * len(self.bands)

        def put(model: str, band: int, standing: int, record: RequestRecord) -> None:
            is_overdue = standing < overdue_before[band]
            num_overdue[band] += is_overdue
            head = standing - shifts.get(model, 0), standing, record.arrival, record
            heapq.heappush(overdue if is_overdue else waiting[band], head)

        lines: dict[tuple[int, str], Iterator[RequestRecord]] = {}
        for band, flows in enumerate(self.bands):
            for model, flow in flows.items():
                assert flow.first is not None
                put(model, band, flow.standing, flow.first)
        while True:
            first = next((band for band, heads in enumerate(waiting) if heads), len(waiting))
            is_overdue = bool(overdue) and (
                any(num_overdue[:first]) or not waiting[first:] or overdue[0] < waiting[first][0]
            )
            if not is_overdue and first == len(waiting):
                return
            record = heapq.heappop(overdue if is_overdue else waiting[first])[3]
            yield record
            band, model = record.request.band, record.request.model
            num_overdue[band] -= is_overdue
            if (band, model) not in lines:
                lines[band, model] = self.bands[band][model].in_order()
                next(lines[band, model])
            following = next(lines[band, model], None)
            if following is not None:  # by then its flow had a grant just before
                put(model, band, following.arrival, following)


def _room_by_band(settings: CoreSettings) -> list[tuple[int, int, int]]:
    """For each band the most requests, tokens and bytes that may wait, of all bands together, for
    one more of it to be let in; the last share that is given holds for all later bands."""
    given = settings.band_queue_shares or (1.0,)
    shares = [given[min(band, len(given) - 1)] for band in range(settings.num_bands)]
    bounds = (settings.max_queued_requests, settings.max_queued_tokens, settings.max_queued_bytes)
    return [
        (ceil(share * bounds[0]), ceil(share * bounds[1]), ceil(share * bounds[2]))
        for share in shares
    ]
