"""A line of people by arrival, each with a cost: who is first, and what stands before somebody.

Rule: arrivals are unique and ascending, cut into chunks of at most 512, each with its sum of costs.
Adding and removing touch one chunk; counting and summing before an arrival pass over the chunks
(a few hundredths of the line) and one bisection. Costs are integers, so sums never drift.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

_MOST = 512


class Chunk:
    """A stretch of a line; never empty."""

    __slots__ = ("arrivals", "cost", "costs")

    def __init__(self, arrivals: list[int], costs: list[int]) -> None:
        self.arrivals = arrivals
        self.costs = costs
        self.cost = sum(costs)


class Line:
    """Arrivals with costs, in ascending order of arrival."""

    __slots__ = ("_chunks", "_len", "cost")

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
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
        if not self._chunks:
            self._chunks.append(Chunk([arrival], [cost]))
            return
        last = self._chunks[-1]
        if arrival > last.arrivals[-1]:
            chunk, at = last, len(last.arrivals)
        else:
            chunk = self._chunks[self._find(arrival)]
            at = bisect_left(chunk.arrivals, arrival)
            assert chunk.arrivals[at] != arrival
        chunk.arrivals.insert(at, arrival)
        chunk.costs.insert(at, cost)
        chunk.cost += cost
        if len(chunk.arrivals) > _MOST:
            self._split(chunk)

    def remove(self, arrival: int) -> None:
        """Remove an arrival that is there."""
        at_chunk = self._find(arrival)
        chunk = self._chunks[at_chunk]
        at = bisect_left(chunk.arrivals, arrival)
        assert chunk.arrivals[at] == arrival
        del chunk.arrivals[at]
        cost = chunk.costs.pop(at)
        chunk.cost -= cost
        self._len -= 1
        self.cost -= cost
        if not chunk.arrivals:
            del self._chunks[at_chunk]

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

    def _find(self, arrival: int) -> int:
        """Index of the chunk that holds the arrival, or would."""
        chunks = self._chunks
        low, high = 0, len(chunks) - 1
        while low < high:
            middle = (low + high) // 2
            if chunks[middle].arrivals[-1] < arrival:
                low = middle + 1
            else:
                high = middle
        return low

    def _split(self, chunk: Chunk) -> None:
        half = len(chunk.arrivals) // 2
        at = self._chunks.index(chunk)
        self._chunks[at : at + 1] = [
            Chunk(chunk.arrivals[:half], chunk.costs[:half]),
            Chunk(chunk.arrivals[half:], chunk.costs[half:]),
        ]
