"""A line of people by arrival, each with a cost: who is first, and what stands before somebody.

Rule: arrivals are unique and ascending, cut into chunks of at most 512, each with its sum of costs.
Adding and removing touch one chunk; counting and summing before an arrival pass over the chunks
(a few hundredths of the line) and one bisection. Costs are integers, so sums never drift.

Numbers lie in arrays, not in lists: a bisection of a list reads one object in memory for each
step, and with a million waiting every one of them is a miss of the cache.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

_MOST = 512


class Chunk:
    """A stretch of a line; never empty."""

    __slots__ = ("arrivals", "cost", "costs")

    def __init__(self, arrivals: "array[int]", costs: "array[int]") -> None:
        self.arrivals = arrivals
        self.costs = costs
        self.cost = sum(costs)


class Line:
    """Arrivals with costs, in ascending order of arrival."""

    __slots__ = ("_chunks", "_lasts", "_len", "cost")

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        # the last arrival of each chunk
        self._lasts = array("q")
        self._len = 0
        # of all together
        self.cost = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[int]:
        for chunk in self._chunks:
            yield from chunk.arrivals

    def items(self) -> Iterator[tuple[int, int]]:
        """(arrival, cost) of each."""
        for chunk in self._chunks:
            yield from zip(chunk.arrivals, chunk.costs, strict=True)

    @property
    def first(self) -> int:
        """The smallest arrival; the line must not be empty."""
        return self._chunks[0].arrivals[0]

    @property
    def last(self) -> int:
        """The largest arrival; the line must not be empty."""
        return self._chunks[-1].arrivals[-1]

    def add(self, arrival: int, cost: int) -> None:
        """Add an arrival that is not there."""
        self._len += 1
        self.cost += cost
        lasts = self._lasts
        if not lasts:
            self._chunks.append(Chunk(array("q", (arrival,)), array("q", (cost,))))
            lasts.append(arrival)
            return
        if arrival > lasts[-1]:
            at_chunk, chunk = len(lasts) - 1, self._chunks[-1]
            chunk.arrivals.append(arrival)
            chunk.costs.append(cost)
            lasts[-1] = arrival
        else:
            at_chunk = bisect_left(lasts, arrival)
            chunk = self._chunks[at_chunk]
            at = bisect_left(chunk.arrivals, arrival)
            assert chunk.arrivals[at] != arrival
            chunk.arrivals.insert(at, arrival)
            chunk.costs.insert(at, cost)
        chunk.cost += cost
        if len(chunk.arrivals) > _MOST:
            self._split(at_chunk)

    def remove(self, arrival: int) -> None:
        """Remove an arrival that is there."""
        at_chunk = bisect_left(self._lasts, arrival)
        chunk = self._chunks[at_chunk]
        arrivals = chunk.arrivals
        at = bisect_left(arrivals, arrival)
        assert arrivals[at] == arrival
        del arrivals[at]
        cost = chunk.costs.pop(at)
        chunk.cost -= cost
        self._len -= 1
        self.cost -= cost
        if not arrivals:
            del self._chunks[at_chunk], self._lasts[at_chunk]
        elif at == len(arrivals):
            self._lasts[at_chunk] = arrivals[-1]

    def before(self, arrival: int) -> tuple[int, int]:
        """(how many, their cost) of those with a smaller arrival."""
        num = cost = 0
        for chunk in self._chunks:
            if chunk.arrivals[-1] < arrival:
                num += len(chunk.arrivals)
                cost += chunk.cost
            else:
                at = bisect_left(chunk.arrivals, arrival)
                return num + at, cost + sum(chunk.costs[:at])
        return num, cost

    def count_before(self, arrival: int) -> int:
        """How many have a smaller arrival."""
        num = 0
        for chunk in self._chunks:
            if chunk.arrivals[-1] >= arrival:
                return num + bisect_left(chunk.arrivals, arrival)
            num += len(chunk.arrivals)
        return num

    def starting_before(self, start: float, arrival: int, key: float, weight: float) -> int:
        """How many have ``(key + cost in front of them / weight, their arrival)`` before
        ``(start, arrival)``; the costs of all in the line must be above 0.

        Both sides of a comparison are computed by that one formula, so that rounding cannot put
        two lines in different orders when seen from either.
        """
        num = passed = 0
        for chunk in self._chunks:
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
            num += len(chunk.arrivals)
            passed += chunk.cost
        return num

    def at(self, index: int) -> int:
        """The arrival with so many before it."""
        for chunk in self._chunks:
            if index < len(chunk.arrivals):
                return chunk.arrivals[index]
            index -= len(chunk.arrivals)
        raise IndexError

    def _split(self, at: int) -> None:
        chunk = self._chunks[at]
        half = len(chunk.arrivals) // 2
        self._chunks[at : at + 1] = [
            Chunk(chunk.arrivals[:half], chunk.costs[:half]),
            Chunk(chunk.arrivals[half:], chunk.costs[half:]),
        ]
        self._lasts.insert(at, chunk.arrivals[half - 1])
