"""The bounded queue: band -> model -> tenant -> requests by arrival.

Rule: who waits is here and nowhere else. A flow is one (band, model). Inside a flow the tenant
with the smallest virtual time goes next (fairness.py), ties by arrival, and of a tenant the oldest
request. What was granted before and came back goes first in its flow, by arrival: its tenant paid
for it already, and nobody who was behind it is granted while it waits.

Places: granting a tenant's head adds its cost to the tenant's virtual time, so the k-th request of
a tenant will start at the virtual time of the tenant + the cost of those before it. These start
times do not change when heads are granted, which makes the place of a request in its flow an order
statistic: those that came back, then for each tenant the number that start earlier.

Cost: add, remove and head are O(log n) whatever waits in other flows (line.py); a place is
O(tenants of the flow). The bounds are checked at the door only (``has_room``). What goes back was
accepted and is never refused, so after losses more may wait than a new request would find room
for; the whole is still bounded by max_inflight.
"""

import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from scheduler_svc.core.domain import CoreSettings, RequestRecord
from scheduler_svc.core.fairness import Fairness
from scheduler_svc.core.lazy_heap import LazyHeap
from scheduler_svc.core.line import Line
from scheduler_svc.core.messages import Request


class Place(NamedTuple):
    """Where a request stands in its flow."""

    num_before: int
    # the largest arrival among those before it and itself: no earlier than this is its turn
    turn: int


class Flow:
    """The waiting requests of one model in one band."""

    def __init__(self, name: tuple[int, str], fairness: Fairness, settings: CoreSettings) -> None:
        self._name = name
        self._fairness = fairness
        self._settings = settings
        # everybody, and those who came back
        self.everybody = Line()
        self._returned = Line()
        # tenant -> its others; no empty lanes
        self._lanes: dict[str, Line] = {}
        # tenants by (virtual time, arrival of the head)
        self._tenants: LazyHeap[tuple[float, int], str] = LazyHeap()
        # arrival of who goes next; meaningless while nobody waits
        self.head = 0

    def add(self, record: RequestRecord, cost: int) -> None:
        """A request waits."""
        arrival, tenant = record.arrival, record.request.tenant
        self.everybody.add(arrival, 0)
        if record.is_returned:
            self._returned.add(arrival, 0)
            self._find_head()
            return
        lane = self._lanes.get(tenant)
        if lane is None:
            lane = self._lanes[tenant] = Line()
            self._fairness.lift(self._name, tenant)
        lane.add(arrival, cost)
        if lane.first == arrival:
            self._rank(tenant, lane)

    def remove(self, record: RequestRecord) -> None:
        """It waits no longer, wherever it stood."""
        arrival, tenant = record.arrival, record.request.tenant
        self.everybody.remove(arrival)
        if record.is_returned:
            self._returned.remove(arrival)
            self._find_head()
            return
        lane = self._lanes[tenant]
        is_head = lane.first == arrival
        lane.remove(arrival)
        if not len(lane):
            del self._lanes[tenant]
            self._tenants.discard(tenant)
            self._find_head()
        elif is_head:
            self._rank(tenant, lane)

    def charged(self, tenant: str) -> None:
        """The tenant's virtual time changed."""
        lane = self._lanes.get(tenant)
        if lane is not None:
            self._rank(tenant, lane)

    def rivals(self, num: int) -> list[int]:
        """Arrivals of the oldest requests of so many tenants, the next tenant first; nobody while
        somebody who came back is first, or if there is one tenant only."""
        if len(self._returned) or len(self._lanes) < 2:
            return []
        return [self._lanes[tenant].first for tenant in self._tenants.first(num)]

    def place(self, record: RequestRecord) -> Place:
        """Where a request stands."""
        arrival = record.arrival
        if record.is_returned:
            return Place(self._returned.count_before(arrival), arrival)
        tenant = record.request.tenant
        num, cost = self._lanes[tenant].before(arrival)
        start = self._fairness.key(self._name, tenant) + cost / self._weight(tenant)
        return self._before(tenant, num, start, arrival)

    def place_of_new(self, tenant: str, arrival: int) -> Place:
        """Where a tenant's next request would stand."""
        lane = self._lanes.get(tenant)
        num, cost = (0, 0) if lane is None else (len(lane), lane.cost)
        start = self._fairness.key(self._name, tenant) + cost / self._weight(tenant)
        return self._before(tenant, num, start, arrival)

    def in_order(self) -> Iterator[int]:
        """Arrivals as they will be granted; lazy."""
        yield from self._returned
        yield from (arrival for _, arrival in heapq.merge(*map(self._starts, self._lanes)))

    def _starts(self, tenant: str) -> Iterator[tuple[float, int]]:
        lane, cost = self._lanes[tenant], 0
        key, weight = self._fairness.key(self._name, tenant), self._weight(tenant)
        for arrival, its_cost in lane.items():
            yield key + cost / weight, arrival
            cost += its_cost

    def _before(self, tenant: str, num: int, start: float, arrival: int) -> Place:
        """How many start earlier than ``start``; equal starts go by arrival."""
        num += len(self._returned)
        turn = max(arrival, self._returned.last if len(self._returned) else 0)
        for other, lane in self._lanes.items():
            if other == tenant:
                continue
            key = self._fairness.key(self._name, other)
            if key > start:
                continue
            before = lane.starting_before(start, arrival, key, self._weight(other))
            if before:
                num += before
                turn = max(turn, lane.at(before - 1))
        return Place(num, turn)

    def _rank(self, tenant: str, lane: Line) -> None:
        key = self._fairness.key(self._name, tenant)
        self._tenants.set(tenant, (key, lane.first))
        self._find_head()

    def _find_head(self) -> None:
        if len(self._returned):
            self.head = self._returned.first
        elif (first := self._tenants.peek()) is not None:
            self.head = first[0][1]

    def _weight(self, tenant: str) -> float:
        return self._settings.tenant_weights.get(tenant, 1.0)


class Queue:
    """All waiting requests."""

    def __init__(self, settings: CoreSettings) -> None:
        self._settings = settings
        self._waiting: dict[int, RequestRecord] = {}
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
        # sums over the waiting
        self.num_tokens = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, record: RequestRecord) -> bool:
        return self._waiting.get(record.arrival) is record

    def has_room(self, request: Request) -> bool:
        """Whether one more stays within the bounds on requests, tokens and bytes."""
        limits = self._settings
        return (
            len(self._waiting) < limits.max_queued_requests
            and self.num_tokens + request.num_tokens <= limits.max_queued_tokens
            and self.num_bytes + request.num_bytes <= limits.max_queued_bytes
        )

    def cost(self, request: Request) -> int:
        """Tokens that fairness charges for it: output costs more than prompt."""
        num_output = request.max_tokens * request.num_samples
        return request.num_prompt_tokens + self._settings.output_token_weight * num_output

    def add(self, record: RequestRecord) -> None:
        """Start or go on waiting, at the place that the rules give."""
        assert record.arrival not in self._waiting
        self._waiting[record.arrival] = record
        request = record.request
        model = request.model
        flows = self.bands[request.band]
        flow = flows.get(model)
        if flow is None:
            flow = flows[model] = Flow((request.band, model), self.fairness, self._settings)
            self.flows.setdefault(model, {})[request.band] = flow
        flow.add(record, self.cost(request))
        self.num_by_model[model] = self.num_by_model.get(model, 0) + 1
        since_ms = self.accepted_ms_by_model.get(model, 0)
        self.accepted_ms_by_model[model] = since_ms + record.accepted_ms
        self.num_tokens += request.num_tokens
        self.num_bytes += request.num_bytes

    def remove(self, record: RequestRecord) -> None:
        """Stop waiting: granted, adopted or finished."""
        del self._waiting[record.arrival]
        request = record.request
        model = request.model
        flows = self.bands[request.band]
        flow = flows[model]
        flow.remove(record)
        if not len(flow.everybody):
            del flows[model]
            del self.flows[model][request.band]
        self.num_by_model[model] -= 1
        self.accepted_ms_by_model[model] -= record.accepted_ms
        if not self.num_by_model[model]:
            del self.num_by_model[model], self.accepted_ms_by_model[model], self.flows[model]
        self.num_tokens -= request.num_tokens
        self.num_bytes -= request.num_bytes

    def charge(self, record: RequestRecord) -> None:
        """It was granted: its tenant pays what it may use."""
        request = record.request
        record.num_charged_tokens = self.cost(request)
        self.fairness.charge(
            (request.band, request.model), request.tenant, record.num_charged_tokens
        )
        self._charged(request)

    def settle(self, record: RequestRecord, num_used_tokens: int) -> None:
        """Its lease ended: what it was charged becomes what it used; once for each charge."""
        if record.num_charged_tokens:
            request = record.request
            name = (request.band, request.model)
            used = min(num_used_tokens, record.num_charged_tokens)
            self.fairness.correct(name, request.tenant, record.num_charged_tokens, used)
            record.num_charged_tokens = 0
            self._charged(request)

    def waited_ms(self, model: str, now_ms: int) -> int:
        """Sum of the waits of a model's requests until now."""
        num_waiting = self.num_by_model.get(model, 0)
        return num_waiting * now_ms - self.accepted_ms_by_model.get(model, 0)

    def at(self, arrival: int) -> RequestRecord:
        """Who came then, and waits."""
        return self._waiting[arrival]

    def head(self, model: str) -> RequestRecord | None:
        """The request of a model that goes first; None if none waits."""
        flows = self.flows.get(model)
        return None if flows is None else self._waiting[flows[min(flows)].head]

    def head_of(self, band: int, model: str) -> RequestRecord | None:
        """Who goes first in a flow."""
        flow = self.bands[band].get(model)
        return None if flow is None else self._waiting[flow.head]

    def is_head(self, record: RequestRecord) -> bool:
        """Whether a live request goes next in its flow."""
        return record in self and self.head_of(record.request.band, record.request.model) is record

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

    def in_order(self, shifts: dict[str, int]) -> Iterator[RequestRecord]:
        """All waiting requests as they will be granted; lazy, so that the first few cost little."""
        for flows in self.bands:
            streams = {model: flow.in_order() for model, flow in flows.items()}
            heads = [
                (arrival - shifts.get(model, 0), arrival, model)
                for model, stream in streams.items()
                for arrival in [next(stream)]
            ]
            heapq.heapify(heads)
            while heads:
                _, arrival, model = heads[0]
                yield self._waiting[arrival]
                following = next(streams[model], None)
                if following is None:
                    heapq.heappop(heads)
                else:
                    key = following - shifts.get(model, 0)
                    heapq.heapreplace(heads, (key, following, model))

    def _charged(self, request: Request) -> None:
        flow = self.bands[request.band].get(request.model)
        if flow is not None:
            flow.charged(request.tenant)
