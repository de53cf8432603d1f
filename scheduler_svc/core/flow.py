"""A flow: the waiting requests of one model in one band, tenants by virtual time.

Rule: what was granted before and came back goes first, by arrival. Then the tenant with the
smallest virtual time goes next (fairness.py), ties by arrival, and of a tenant its oldest request.

Standing: against other flows it competes by the arrival of who goes next, as in any queue. But that
may always be somebody who just came and soon gives up, first because its tenant had nothing yet,
while others wait behind it: so it counts as if it came no later than E after the oldest of all, or
after its last grant if that was later. Each grant uses that up: otherwise a flow in which one
tenant goes first for long would take all slots from others that wait, by the age of those behind.

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

from scheduler_svc.core import priority
from scheduler_svc.core.domain import CoreSettings, RequestRecord
from scheduler_svc.core.fairness import Fairness
from scheduler_svc.core.line import Crowd, Line
from scheduler_svc.core.message import message

# of a tenant's next request in its flow: virtual time, arrival, it, and those after it
_Start = tuple[float, int, RequestRecord, Iterator[tuple[float, int, RequestRecord]]]


@message(frozen=True, slots=True)
class Place:
    """Where a request stands in its flow."""

    num_before: int
    # the largest arrival among those before it and itself: no earlier than this is its turn
    turn: int
    # how many of those before it are its tenant's
    num_own: int = 0


class Order:
    """The tenants' lines of a flow by (virtual time, arrival of the oldest request)."""

    __slots__ = ("_keys", "_lanes", "_oldest")

    def __init__(self) -> None:
        # sorted, the same index is the same line
        self._keys = array("d")
        self._lanes: list[Line] = []
        # the oldest request of each
        self._oldest: list[RequestRecord] = []

    def __len__(self) -> int:
        return len(self._lanes)

    @property
    def first(self) -> RequestRecord | None:
        """The oldest request of the tenant that goes first; None if nobody is there."""
        return self._oldest[0] if self._oldest else None

    def set(self, lane: Line, key: float) -> None:
        """Enter a line that is not empty, or move it."""
        first = lane.first
        turn = first.arrival
        if lane.turn >= 0:
            if lane.key == key and lane.turn == turn:
                return
            self.remove(lane)
        keys = self._keys
        at = bisect_left(keys, key)
        if at < len(keys) and keys[at] == key:
            at = self._among_equals(at, key, turn)
        keys.insert(at, key)
        self._lanes.insert(at, lane)
        self._oldest.insert(at, first)
        lane.key, lane.turn = key, turn

    def remove(self, lane: Line) -> None:
        """Nobody of it waits any more."""
        lanes = self._lanes
        at = 0 if lanes[0] is lane else bisect_left(self._keys, lane.key)
        if lanes[at] is not lane:
            at = self._among_equals(at, lane.key, lane.turn)
            assert lanes[at] is lane
        self._keys.pop(at)
        del lanes[at], self._oldest[at]
        lane.turn = -1

    def key(self, at: int) -> float:
        """Virtual time of the tenant with so many before it."""
        return self._keys[at]

    def entry(self, at: int) -> tuple[float, int]:
        """What that tenant is sorted by."""
        return self._keys[at], self._lanes[at].turn

    def oldest(self, at: int) -> RequestRecord:
        """The oldest request of the tenant with so many before it."""
        return self._oldest[at]

    def _among_equals(self, at: int, key: float, turn: int) -> int:
        """Where a line is or belongs among those of one virtual time, which begin there."""
        lanes = self._lanes
        low, high = at, bisect_right(self._keys, key, at)
        while low < high:
            middle = (low + high) // 2
            if lanes[middle].turn < turn:
                low = middle + 1
            else:
                high = middle
        return low


class Flow:
    """The waiting requests of one model in one band."""

    def __init__(self, name: tuple[int, str], fairness: Fairness, settings: CoreSettings) -> None:
        self.name = name
        self._fairness = fairness
        self._settings = settings
        self.everybody = Crowd()
        # who came back
        self._returned = Line()
        # tenant -> its others; no empty lanes
        self._lanes: dict[str, Line] = {}
        # an empty one, for the next tenant: most have one request at a time
        self._spare: Line | None = None
        self._order = Order()
        # who goes next; None while nobody waits
        self.first: RequestRecord | None = None
        # the arrival that this one counts as against other flows
        self.standing = 0
        # the arrival that somebody would have who came with the last grant; 0: none since it began
        self.last_turn = 0
        self._patience = priority.aging(settings)
        # the arrival that was last found to be the smallest, and when it was accepted
        self._oldest = -1
        self._oldest_ms = 0

    def __contains__(self, record: RequestRecord) -> bool:
        line = self._returned if record.is_returned else self._lanes.get(record.request.tenant)
        return line is not None and record in list(line)

    def add(self, record: RequestRecord, cost: int) -> None:
        """A request waits."""
        arrival, tenant = record.arrival, record.request.tenant
        self.everybody.add(arrival)
        if record.is_returned:
            self._returned.add(record, 0)
            self._find_head()
            return
        lane = self._lanes.get(tenant)
        if lane is None:
            lane = Line() if self._spare is None else self._spare
            self._lanes[tenant], self._spare = lane, None
            lane.add(record, cost)
            self._rank(lane, self._fairness.lift(self.name, tenant))
            return
        lane.add(record, cost)
        if lane.first is record:
            self._rank(lane, self._fairness.key(self.name, tenant))

    def remove(self, record: RequestRecord, key: float | None = None) -> None:
        """It waits no longer, wherever it stood; ``key``: its tenant's new virtual time."""
        tenant = record.request.tenant
        self.everybody.remove(record.arrival)
        if record.is_returned:
            self._returned.remove(record)
            self._find_head()
            if key is not None:
                self.charged(tenant, key)
            return
        lane = self._lanes[tenant]
        lane.remove(record)
        if not len(lane):
            del self._lanes[tenant]
            self._order.remove(lane)
            self._spare = lane
            self._fairness.leave(self.name, tenant)
            self._find_head()
        elif key is not None:
            self._rank(lane, key)
        elif lane.turn == record.arrival:
            self._rank(lane, self._fairness.key(self.name, tenant))

    def charged(self, tenant: str, key: float) -> None:
        """The tenant's virtual time changed."""
        lane = self._lanes.get(tenant)
        if lane is not None:
            self._rank(lane, key)

    def rivals(self, num: int) -> list[RequestRecord]:
        """The oldest requests of the next few tenants after the first that may jump it; nobody
        while somebody who came back is first."""
        if len(self._returned):
            return []
        order, found = self._order, list[RequestRecord]()
        first = order.key(0)
        for at in range(1, min(num + 1, len(order))):
            if self._fairness.may_jump(order.key(at), first):
                found.append(order.oldest(at))
        return found

    def oldest_ms(self) -> int:
        """When the oldest request was accepted, which need not be the head; somebody must wait."""
        arrival = self.everybody.first
        if self._oldest != arrival:
            lines = [self._returned, *self._lanes.values()]
            [oldest] = [x.first for x in lines if len(x) and x.first.arrival == arrival]
            self._oldest, self._oldest_ms = arrival, oldest.accepted_ms
        return self._oldest_ms

    def competes(self, tenant: str) -> bool:
        """Whether a tenant waits in this flow beside others, so that its virtual time matters."""
        return tenant in self._lanes and len(self._lanes) > 1

    def place(self, record: RequestRecord) -> Place:
        """Where a request stands."""
        arrival = record.arrival
        if record.is_returned:
            return Place(self._returned.before(arrival)[0], arrival)
        tenant = record.request.tenant
        num, cost = self._lanes[tenant].before(arrival)
        start = self._fairness.key(self.name, tenant) + cost / self._weight(tenant)
        return self._before(tenant, num, start, arrival)

    def place_of_new(self, tenant: str, arrival: int) -> Place:
        """Where a tenant's next request would stand."""
        lane = self._lanes.get(tenant)
        num, cost = (0, 0) if lane is None else (len(lane), lane.cost)
        start = self._fairness.key(self.name, tenant) + cost / self._weight(tenant)
        return self._before(tenant, num, start, arrival)

    def in_order(self) -> Iterator[RequestRecord]:
        """As they will be granted; the first few cost no more where there are many tenants."""
        yield from self._returned
        starts: list[_Start] = []
        order, num_begun = self._order, 0
        while starts or num_begun < len(order):
            # the next tenant's first request starts at its virtual time
            if num_begun < len(order) and (not starts or order.entry(num_begun) < starts[0][:2]):
                others = self._starts(order.oldest(num_begun).request.tenant)
                heapq.heappush(starts, (*next(others), others))
                num_begun += 1
                continue
            _, _, record, others = starts[0]
            following = next(others, None)
            if following is None:
                heapq.heappop(starts)
            else:
                heapq.heapreplace(starts, (*following, others))
            yield record

    def _starts(self, tenant: str) -> Iterator[tuple[float, int, RequestRecord]]:
        lane, cost = self._lanes[tenant], 0
        key, weight = self._fairness.key(self.name, tenant), self._weight(tenant)
        for record, its_cost in lane.items():
            yield key + cost / weight, record.arrival, record
            cost += its_cost

    def _before(self, tenant: str, num: int, start: float, arrival: int) -> Place:
        """Who starts earlier than ``start``, ``num`` of them its own; ties go by arrival."""
        num_own = num
        num += len(self._returned)
        turn = max(arrival, self._returned.last.arrival if len(self._returned) else 0)
        for other, lane in self._lanes.items():
            if other == tenant:
                continue
            key = self._fairness.key(self.name, other)
            if key > start:
                continue
            before = lane.starting_before(start, arrival, key, self._weight(other))
            if before:
                num += before
                turn = max(turn, lane.at(before - 1).arrival)
        return Place(num, turn, num_own)

    def _rank(self, lane: Line, key: float) -> None:
        self._order.set(lane, key)
        self._find_head()

    def _find_head(self) -> None:
        first = self.first = (
            self._returned.records[0] if self._returned.records else self._order.first
        )
        if first is not None:
            since = self.everybody.first
            if self.last_turn > since:
                since = self.last_turn
            arrival, latest = first.arrival, since + self._patience
            self.standing = arrival if arrival < latest else latest

    def _weight(self, tenant: str) -> float:
        return self._settings.tenant_weights.get(tenant, 1.0)
