"""Lines of people by arrival: who is first, and what stands before somebody.

Rule: arrivals are unique and ascending, cut into chunks of at most 512. Adding and removing touch
one chunk; counting and summing before an arrival pass over the chunks (a few hundredths of the
line) and one bisection. Costs are integers, so sums never drift.

A ``Line`` holds requests, each with a cost; a ``Crowd`` knows arrivals alone.

With a million waiting every object that is read is a miss of the cache. So numbers lie in arrays,
and a line is its own first chunk: most lines have no other, and who is first is found at once.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from scheduler_svc.core.domain import RequestRecord

_MOST: Final = 512


class Chunk:
    """A stretch of a line."""

    __slots__ = ("chunk_cost", "costs", "records")

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.costs = array("q")
        self.chunk_cost = 0

    def put(self, record: RequestRecord, cost: int) -> None:
        """Add a request at its place."""
        self.chunk_cost += cost
        records, arrival = self.records, record.arrival
        if not records or arrival > records[-1].arrival:
            records.append(record)
            self.costs.append(cost)
            return
        at = self.num_before(arrival)
        assert records[at].arrival != arrival
        records.insert(at, record)
        self.costs.insert(at, cost)

    def take(self, record: RequestRecord) -> int:
        """Remove a request; its cost."""
        records = self.records
        at = 0 if records[0] is record else self.num_before(record.arrival)
        assert records[at] is record
        del records[at]
        cost = self.costs.pop(at)
        self.chunk_cost -= cost
        return cost

    def num_before(self, arrival: int) -> int:
        """How many have a smaller arrival."""
        records = self.records
        low, high = 0, len(records)
        while low < high:
            middle = (low + high) // 2
            if records[middle].arrival < arrival:
                low = middle + 1
            else:
                high = middle
        return low

    def second_half(self) -> "Chunk":
        """Cut off, as a chunk of its own."""
        half, rest = len(self.records) // 2, Chunk()
        rest.records, self.records = self.records[half:], self.records[:half]
        rest.costs, self.costs = self.costs[half:], self.costs[:half]
        rest.chunk_cost = sum(rest.costs)
        self.chunk_cost -= rest.chunk_cost
        return rest


class Line(Chunk):
    """Requests with costs, in ascending order of arrival; itself the first chunk of them."""

    __slots__ = ("_len", "_rest", "cost", "key", "turn")

    def __init__(self) -> None:
        super().__init__()
        # the chunks after it, none of them empty
        self._rest: list[Chunk] | None = None
        self._len = 0
        # of all together
        self.cost = 0
        # what it is sorted by among the lines of a flow (flow.Order); turn -1: not there
        self.key = 0.0
        self.turn = -1

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[RequestRecord]:
        for chunk in self._chunks():
            yield from chunk.records

    def items(self) -> Iterator[tuple[RequestRecord, int]]:
        """(request, cost) of each."""
        for chunk in self._chunks():
            yield from zip(chunk.records, chunk.costs, strict=True)

    @property
    def first(self) -> RequestRecord:
        """The one with the smallest arrival; the line must not be empty."""
        return self.records[0]

    @property
    def last(self) -> RequestRecord:
        """The one with the largest arrival; the line must not be empty."""
        return self._chunks()[-1].records[-1]

    def add(self, record: RequestRecord, cost: int) -> None:
        """Add a request whose arrival is not there."""
        self._len += 1
        self.cost += cost
        chunk = self._chunk_of(record.arrival)
        chunk.put(record, cost)
        if len(chunk.records) > _MOST:
            rest = self._rest = self._rest or []
            rest.insert(0 if chunk is self else rest.index(chunk) + 1, chunk.second_half())

    def remove(self, record: RequestRecord) -> None:
        """Remove a request that is there."""
        chunk = self._chunk_of(record.arrival)
        self.cost -= chunk.take(record)
        self._len -= 1
        rest = self._rest
        if rest is None or chunk.records:
            return
        if chunk is self:
            following = rest.pop(0)
            self.records, self.costs = following.records, following.costs
            self.chunk_cost = following.chunk_cost
        else:
            rest.remove(chunk)
        if not rest:
            self._rest = None

    def before(self, arrival: int) -> tuple[int, int]:
        """(how many, their cost) of those with a smaller arrival."""
        num = cost = 0
        for chunk in self._chunks():
            at = chunk.num_before(arrival)
            if at < len(chunk.records):
                return num + at, cost + sum(chunk.costs[:at])
            num += at
            cost += chunk.chunk_cost
        return num, cost

    def starting_before(self, start: float, arrival: int, key: float, weight: float) -> int:
        """How many have ``(key + cost in front of them / weight, their arrival)`` before
        ``(start, arrival)``; the costs of all in the line must be above 0.

        Both sides of a comparison are computed by that one formula, so that rounding cannot put
        two lines in different orders when seen from either.
        """
        num = passed = 0
        for chunk in self._chunks():
            if key + (passed + chunk.chunk_cost) / weight > start:
                # starts[i] = cost in front of the i-th of the chunk
                starts = list(accumulate(chunk.costs[:-1], initial=passed))
                at = bisect_left(starts, start, key=lambda cost: key + cost / weight)
                while (
                    at < len(starts)
                    and key + starts[at] / weight == start
                    and chunk.records[at].arrival < arrival
                ):
                    at += 1
                return num + at
            num += len(chunk.records)
            passed += chunk.chunk_cost
        return num

    def at(self, index: int) -> RequestRecord:
        """The request with so many before it."""
        for chunk in self._chunks():
            if index < len(chunk.records):
                return chunk.records[index]
            index -= len(chunk.records)
        raise IndexError

    def _chunks(self) -> list[Chunk]:
        return [self] if self._rest is None else [self, *self._rest]

    def _chunk_of(self, arrival: int) -> Chunk:
        """The one that an arrival is in or belongs in."""
        rest = self._rest
        if rest is None or arrival <= self.records[-1].arrival:
            return self
        low, high = 0, len(rest) - 1
        while low < high:
            middle = (low + high) // 2
            if rest[middle].records[-1].arrival < arrival:
                low = middle + 1
            else:
                high = middle
        return rest[low]


class Crowd:
    """Arrivals, to be counted."""

    __slots__ = ("_chunks", "_lasts", "_len")

    def __init__(self) -> None:
        # none empty
        self._chunks: list[array[int]] = []
        # the last arrival of each
        self._lasts = array("q")
        self._len = 0

    def __len__(self) -> int:
        return self._len

    @property
    def first(self) -> int:
        """The smallest arrival; somebody must be there."""
        return self._chunks[0][0]

    def add(self, arrival: int) -> None:
        """Add an arrival that is not there."""
        self._len += 1
        lasts = self._lasts
        if not lasts:
            self._chunks.append(array("q", (arrival,)))
            lasts.append(arrival)
            return
        if arrival > lasts[-1]:
            at_chunk, chunk = len(lasts) - 1, self._chunks[-1]
            chunk.append(arrival)
            lasts[-1] = arrival
        else:
            at_chunk = bisect_left(lasts, arrival)
            chunk = self._chunks[at_chunk]
            chunk.insert(bisect_left(chunk, arrival), arrival)
        if len(chunk) > _MOST:
            half = len(chunk) // 2
            self._chunks[at_chunk : at_chunk + 1] = [chunk[:half], chunk[half:]]
            lasts.insert(at_chunk, chunk[half - 1])

    def remove(self, arrival: int) -> None:
        """Remove an arrival that is there."""
        # mostly those who came first
        at_chunk = 0 if arrival <= self._lasts[0] else bisect_left(self._lasts, arrival)
        chunk = self._chunks[at_chunk]
        at = 0 if chunk[0] == arrival else bisect_left(chunk, arrival)
        assert chunk[at] == arrival
        del chunk[at]
        self._len -= 1
        if not chunk:
            del self._chunks[at_chunk], self._lasts[at_chunk]
        elif at == len(chunk):
            self._lasts[at_chunk] = chunk[-1]

    def count_before(self, arrival: int) -> int:
        """How many are smaller."""
        at_chunk = bisect_left(self._lasts, arrival)
        num = sum(map(len, self._chunks[:at_chunk]))
        if at_chunk < len(self._chunks):
            num += bisect_left(self._chunks[at_chunk], arrival)
        return num
