"""Lines of people by arrival: who is first, and what stands before somebody.

Rule: arrivals are unique and ascending, cut into chunks of at most 512. Adding and removing touch
one chunk; counting and summing before an arrival pass over the chunks (a few hundredths of the
line) and one bisection. Costs are integers, so sums never drift.

A ``Line`` holds requests, each with a cost; a ``Crowd`` knows arrivals alone.

Numbers lie in arrays, not in lists: a bisection of a list reads one object in memory for each
step, and with a million waiting every one of them is a miss of the cache. Most lines are short, so
one chunk stands without a list of chunks, and only what is longer has one.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from scheduler_svc.core.domain import RequestRecord

_MOST = 512


class Chunk:
    """A stretch of a line; empty only where the whole line is."""

    __slots__ = ("arrivals", "cost", "costs", "records")

    def __init__(self) -> None:
        self.arrivals = array("q")
        self.costs = array("q")
        self.records: list[RequestRecord] = []
        # of all together
        self.cost = 0

    def second_half(self) -> "Chunk":
        """Cut off, as a chunk of its own."""
        half, rest = len(self.arrivals) // 2, Chunk()
        rest.arrivals, self.arrivals = self.arrivals[half:], self.arrivals[:half]
        rest.costs, self.costs = self.costs[half:], self.costs[:half]
        rest.records, self.records = self.records[half:], self.records[:half]
        rest.cost = sum(rest.costs)
        self.cost -= rest.cost
        return rest


class Line:
    """Requests with costs, in ascending order of arrival; and where it stands among others."""

    __slots__ = ("_front", "_len", "_rest", "cost", "key", "turn")

    def __init__(self) -> None:
        self._front = Chunk()
        # the chunks after it
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
        return self._front.records[0]

    @property
    def last(self) -> RequestRecord:
        """The one with the largest arrival; the line must not be empty."""
        chunk = self._front if self._rest is None else self._rest[-1]
        return chunk.records[-1]

    def add(self, record: RequestRecord, cost: int) -> None:
        """Add a request whose arrival is not there."""
        arrival = record.arrival
        chunk = self._front if self._rest is None else self._chunk_of(arrival)
        self._len += 1
        self.cost += cost
        chunk.cost += cost
        records = chunk.records
        if not records or arrival > records[-1].arrival:
            chunk.arrivals.append(arrival)
            chunk.costs.append(cost)
            records.append(record)
        else:
            at = bisect_left(chunk.arrivals, arrival)
            assert chunk.arrivals[at] != arrival
            chunk.arrivals.insert(at, arrival)
            chunk.costs.insert(at, cost)
            records.insert(at, record)
        if len(records) > _MOST:
            self._split(chunk)

    def remove(self, record: RequestRecord) -> None:
        """Remove a request that is there."""
        arrival = record.arrival
        chunk = self._front if self._rest is None else self._chunk_of(arrival)
        records = chunk.records
        at = 0 if records[0] is record else bisect_left(chunk.arrivals, arrival)
        assert records[at] is record
        del records[at]
        chunk.arrivals.pop(at)
        cost = chunk.costs.pop(at)
        chunk.cost -= cost
        self._len -= 1
        self.cost -= cost
        if not records and self._rest is not None:
            self._drop(chunk)

    def before(self, arrival: int) -> tuple[int, int]:
        """(how many, their cost) of those with a smaller arrival."""
        num = cost = 0
        for chunk in self._chunks():
            at = bisect_left(chunk.arrivals, arrival)
            if at < len(chunk.arrivals):
                return num + at, cost + sum(chunk.costs[:at])
            num += at
            cost += chunk.cost
        return num, cost

    def starting_before(self, start: float, arrival: int, key: float, weight: float) -> int:
        """How many have ``(key + cost in front of them / weight, their arrival)`` before
        ``(start, arrival)``; the costs of all in the line must be above 0.

        Both sides of a comparison are computed by that one formula, so that rounding cannot put
        two lines in different orders when seen from either.
        """
        num = passed = 0
        for chunk in self._chunks():
            if key + (passed + chunk.cost) / weight > start:
                # starts[i] = cost in front of the i-th of the chunk
                starts = list(accumulate(chunk.costs[:-1], initial=passed))
                at = bisect_left(starts, start, key=lambda cost: key + cost / weight)
                while (
                    at < len(starts)
                    and key + starts[at] / weight == start
                    and chunk.arrivals[at] < arrival
                ):
                    at += 1
                return num + at
            num += len(chunk.records)
            passed += chunk.cost
        return num

    def at(self, index: int) -> RequestRecord:
        """The request with so many before it."""
        for chunk in self._chunks():
            if index < len(chunk.records):
                return chunk.records[index]
            index -= len(chunk.records)
        raise IndexError

    def _chunks(self) -> list[Chunk]:
        return [self._front] if self._rest is None else [self._front, *self._rest]

    def _chunk_of(self, arrival: int) -> Chunk:
        """The one that an arrival is in or belongs in."""
        rest = self._rest
        assert rest is not None
        if arrival <= self._front.records[-1].arrival:
            return self._front
        low, high = 0, len(rest) - 1
        while low < high:
            middle = (low + high) // 2
            if rest[middle].records[-1].arrival < arrival:
                low = middle + 1
            else:
                high = middle
        return rest[low]

    def _split(self, chunk: Chunk) -> None:
        second = chunk.second_half()
        if self._rest is None:
            self._rest = [second]
        elif chunk is self._front:
            self._rest.insert(0, second)
        else:
            self._rest.insert(self._rest.index(chunk) + 1, second)

    def _drop(self, chunk: Chunk) -> None:
        """An empty one, of several."""
        rest = self._rest
        assert rest is not None
        if chunk is self._front:
            self._front = rest.pop(0)
        else:
            rest.remove(chunk)
        if not rest:
            self._rest = None


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
        at_chunk = bisect_left(self._lasts, arrival)
        chunk = self._chunks[at_chunk]
        at = bisect_left(chunk, arrival)
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
