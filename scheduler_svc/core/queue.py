"""The bounded queue: band -> model -> tenant -> requests by arrival number.

Rule: who waits is here and nowhere else. A flow is one (band, model). Inside a flow the tenant
whose head has the smallest key goes next; today the key is the head's arrival number, which makes
a flow FIFO over all tenants. A request that goes back keeps its arrival number and so is at the
head of its flow again: nobody who was behind it can be granted while it waits. The head of a
model is the head of its first band that has one.

Cost: add, remove and head are O(log n) and do not depend on how many wait in other flows.
Positions are order statistics: each flow keeps its arrival numbers as bits in blocks of 4,096
with a count for each block, so counting those before a number takes one pass over the blocks
(a thousandth of the queue) and one popcount.

The bounds are checked at the door only (``has_room``). What goes back to the queue was accepted
and is never refused, so after losses more may wait than a new request would find room for; the
whole is still bounded by max_inflight.
"""

import heapq
from collections.abc import Iterable, Iterator

from scheduler_svc.core.domain import CoreSettings, RequestRecord
from scheduler_svc.core.lazy_heap import LazyHeap
from scheduler_svc.core.messages import Request

_BLOCK_BITS = 12
_OFFSET_MASK = (1 << _BLOCK_BITS) - 1


class ArrivalSet:
    """A set of arrival numbers that can count how many lie below one."""

    def __init__(self) -> None:
        # block number -> its members as bits; no empty blocks
        self._bits: dict[int, int] = {}
        # block number -> how many bits are set
        self._counts: dict[int, int] = {}
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def add(self, arrival: int) -> None:
        """Add a number that is not there."""
        block, bit = arrival >> _BLOCK_BITS, 1 << (arrival & _OFFSET_MASK)
        bits = self._bits.get(block, 0)
        assert not bits & bit
        self._bits[block] = bits | bit
        self._counts[block] = self._counts.get(block, 0) + 1
        self._len += 1

    def remove(self, arrival: int) -> None:
        """Remove a number that is there."""
        block, bit = arrival >> _BLOCK_BITS, 1 << (arrival & _OFFSET_MASK)
        bits = self._bits[block]
        assert bits & bit
        self._len -= 1
        if bits == bit:
            del self._bits[block], self._counts[block]
        else:
            self._bits[block] = bits ^ bit
            self._counts[block] -= 1

    def count_before(self, arrival: int) -> int:
        """How many members are smaller."""
        block, below = arrival >> _BLOCK_BITS, (1 << (arrival & _OFFSET_MASK)) - 1
        count = (self._bits.get(block, 0) & below).bit_count()
        return count + sum(n for other, n in self._counts.items() if other < block)

    def __iter__(self) -> Iterator[int]:
        for block in sorted(self._bits):
            bits = self._bits[block]
            while bits:
                lowest = bits & -bits
                yield (block << _BLOCK_BITS) + lowest.bit_length() - 1
                bits ^= lowest


class Flow:
    """The waiting requests of one model in one band."""

    def __init__(self) -> None:
        self.arrivals = ArrivalSet()
        # tenant -> its arrival numbers; no empty lanes
        self._lanes: dict[str, LazyHeap[int, int]] = {}
        # tenants by the key of their head
        self._tenants: LazyHeap[int, str] = LazyHeap()

    def add(self, tenant: str, arrival: int) -> None:
        """A request of this tenant waits."""
        self.arrivals.add(arrival)
        lane = self._lanes.get(tenant)
        if lane is None:
            lane = self._lanes[tenant] = LazyHeap()
        lane.set(arrival, arrival)
        self._rank(tenant, lane)

    def remove(self, tenant: str, arrival: int) -> None:
        """It waits no longer, wherever it stood."""
        self.arrivals.remove(arrival)
        lane = self._lanes[tenant]
        lane.discard(arrival)
        self._rank(tenant, lane)

    def head(self) -> int:
        """Arrival number of who goes next."""
        first = self._tenants.peek()
        assert first is not None
        return first[0]

    def _rank(self, tenant: str, lane: LazyHeap[int, int]) -> None:
        head = lane.peek()
        if head is None:
            del self._lanes[tenant]
            self._tenants.discard(tenant)
        else:
            self._tenants.set(tenant, head[0])


class Queue:
    """All waiting requests."""

    def __init__(self, settings: CoreSettings) -> None:
        self._settings = settings
        self._waiting: dict[int, RequestRecord] = {}
        # by band; no empty flows
        self._bands: list[dict[str, Flow]] = [{} for _ in range(settings.num_bands)]
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

    def add(self, record: RequestRecord) -> None:
        """Start or go on waiting, at the place that the arrival number gives."""
        assert record.arrival not in self._waiting
        self._waiting[record.arrival] = record
        request = record.request
        flows = self._bands[request.band]
        flow = flows.get(request.model)
        if flow is None:
            flow = flows[request.model] = Flow()
        flow.add(request.tenant, record.arrival)
        self.num_tokens += request.num_tokens
        self.num_bytes += request.num_bytes

    def remove(self, record: RequestRecord) -> None:
        """Stop waiting: granted, adopted or finished."""
        del self._waiting[record.arrival]
        request = record.request
        flows = self._bands[request.band]
        flow = flows[request.model]
        flow.remove(request.tenant, record.arrival)
        if not len(flow.arrivals):
            del flows[request.model]
        self.num_tokens -= request.num_tokens
        self.num_bytes -= request.num_bytes

    def head(self, model: str) -> RequestRecord | None:
        """The one request of a model that may be granted next."""
        for flows in self._bands:
            flow = flows.get(model)
            if flow is not None:
                return self._waiting[flow.head()]
        return None

    def num_waiting(self, models: Iterable[str]) -> int:
        """How many wait for any of these models."""
        return sum(
            len(flows[model].arrivals)
            for model in models
            for flows in self._bands
            if model in flows
        )

    def num_before(self, record: RequestRecord, models: Iterable[str]) -> int:
        """How many requests for these models rank before a waiting one."""
        band = record.request.band
        count = 0
        for model in models:
            for flows in self._bands[:band]:
                if model in flows:
                    count += len(flows[model].arrivals)
            flow = self._bands[band].get(model)
            if flow is not None:
                count += flow.arrivals.count_before(record.arrival)
        return count

    def in_order(self) -> Iterator[RequestRecord]:
        """All waiting requests by rank; lazy, so that the first few cost little."""
        for flows in self._bands:
            for arrival in heapq.merge(*(flow.arrivals for flow in flows.values())):
                yield self._waiting[arrival]
