"""A flow: the waiting requests of one model in one band, tenants by virtual time.

Rule: what was granted before and came back goes first, by arrival. Then the tenant with the
smallest virtual time goes next (fairness.py), ties by arrival, and of a tenant its oldest request.

Places: granting a tenant's head adds its cost to the tenant's virtual time, so the k-th request of
a tenant will start at the virtual time of the tenant + the cost of those before it. These start
times do not change when heads are granted, which makes the place of a request in its flow an order
statistic: those that came back, then for each tenant the number that start earlier.

Cost: add, remove and head are O(log n), but for moving what lies behind a tenant in its flow's
sorted arrays (memmove: about 2 us at 10,000 tenants); a place is O(tenants of the flow).
"""

import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from scheduler_svc.core.domain import CoreSettings, RequestRecord
from scheduler_svc.core.fairness import Fairness
from scheduler_svc.core.line import Line


class Place(NamedTuple):
    """Where a request stands in its flow."""

    num_before: int
    # the largest arrival among those before it and itself: no earlier than this is its turn
    turn: int


class Order:
    """The tenants of a flow by (virtual time, arrival of the oldest request)."""

    __slots__ = ("_arrivals", "_keys", "_tenants", "_turns")

    def __init__(self) -> None:
        # sorted, the same index is the same tenant
        self._keys = array("d")
        self._arrivals = array("q")
        self._tenants: list[str] = []
        # tenant -> (virtual time, arrival) by which it stands there
        self._turns: dict[str, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def set(self, tenant: str, key: float, arrival: int) -> None:
        """Enter a tenant or move it."""
        if tenant in self._turns:
            self.remove(tenant)
        at = self._find(key, arrival)
        self._keys.insert(at, key)
        self._arrivals.insert(at, arrival)
        self._tenants.insert(at, tenant)
        self._turns[tenant] = key, arrival

    def remove(self, tenant: str) -> None:
        """It has nobody waiting any more."""
        at = self._find(*self._turns.pop(tenant))
        del self._keys[at], self._arrivals[at], self._tenants[at]

    def arrival(self, tenant: str) -> int:
        """The oldest request of a tenant that is there."""
        return self._turns[tenant][1]

    def first(self, num: int) -> list[tuple[float, int]]:
        """(virtual time, arrival) of the first few."""
        return list(zip(self._keys[:num], self._arrivals[:num], strict=True))

    def first_arrival(self) -> int:
        """Of the first one; there must be one."""
        return self._arrivals[0]

    def _find(self, key: float, arrival: int) -> int:
        keys = self._keys
        at = bisect_left(keys, key)
        if at < len(keys) and keys[at] == key:
            return bisect_left(self._arrivals, arrival, at, bisect_right(keys, key, at))
        return at


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
        self._order = Order()
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
            self._rank(tenant, lane, self._fairness.key(self._name, tenant))

    def remove(self, record: RequestRecord, key: float | None = None) -> None:
        """It waits no longer, wherever it stood; ``key``: its tenant's new virtual time."""
        arrival, tenant = record.arrival, record.request.tenant
        self.everybody.remove(arrival)
        if record.is_returned:
            self._returned.remove(arrival)
            self._find_head()
            if key is not None:
                self.charged(tenant, key)
            return
        lane = self._lanes[tenant]
        lane.remove(arrival)
        if not len(lane):
            del self._lanes[tenant]
            self._order.remove(tenant)
            self._fairness.leave(self._name, tenant)
            self._find_head()
        elif key is not None:
            self._rank(tenant, lane, key)
        elif self._order.arrival(tenant) == arrival:
            self._rank(tenant, lane, self._fairness.key(self._name, tenant))

    def charged(self, tenant: str, key: float) -> None:
        """The tenant's virtual time changed."""
        lane = self._lanes.get(tenant)
        if lane is not None:
            self._rank(tenant, lane, key)

    def rivals(self, num: int) -> list[int]:
        """Arrivals of the oldest requests of the next few tenants after the first that may jump
        it; nobody while somebody who came back is first."""
        if len(self._returned):
            return []
        (first, _), *others = self._order.first(num + 1)
        return [arrival for key, arrival in others if self._fairness.may_jump(key, first)]

    def competes(self, tenant: str) -> bool:
        """Whether a tenant waits in this flow beside others, so that its virtual time matters."""
        return tenant in self._lanes and len(self._lanes) > 1

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

    def _rank(self, tenant: str, lane: Line, key: float) -> None:
        self._order.set(tenant, key, lane.first)
        self._find_head()

    def _find_head(self) -> None:
        if len(self._returned):
            self.head = self._returned.first
        elif len(self._order):
            self.head = self._order.first_arrival()

    def _weight(self, tenant: str) -> float:
        return self._settings.tenant_weights.get(tenant, 1.0)
