"""How long leases take on one executor: three models of an engine, from crude to fine.

Rule: an engine hears of starts and stops and is asked for what happened until a given time, in
its own clock: milliseconds as floats, so that rounding to the simulator's whole ones adds nothing
up. It never looks ahead: what it reports can only depend on what it was told before.

- slot: every lease runs at one rate, that of a full batch, whatever else runs.
- fluid: prefills one after another, all decoding sequences share the rate of the batch there is.
- step: one iteration after another; whoever comes waits for the step that runs; prefill is
  chunked and slows the step for all. Stretches of equal steps are taken in one leap.

Use slot and fluid to rank policies, step for latencies (the fluid model ignores the wait for the
running step). No model has a KV budget or a prefix cache.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from math import ceil, inf
from typing import Protocol

from bench.sim.costs import Costs

# (lease, its last token came): False is its first token, which may be its last as well
Happening = tuple[str, bool]


class Engine(Protocol):
    """What an executor needs to know about its engine."""

    def start(self, key: str, num_prompt: int, num_output: int, now: float) -> None:
        """A lease begins; ``advance(now)`` came before."""

    def stop(self, key: str, now: float) -> int:
        """A lease ends from outside; gives how many tokens it has generated."""

    def advance(self, now: float) -> list[Happening]:
        """What happened until ``now``, in order of time."""

    def next_ms(self) -> float:
        """When something happens next if nothing is told; infinity if nothing will."""


class SlotEngine:
    """Every lease at one fixed rate."""

    def __init__(self, costs: Costs, num_slots: int) -> None:
        self._costs = costs
        self._token_ms = costs.token_ms(num_slots)
        # (when, lease, is its end); entries of stopped leases are passed over
        self._heap: list[tuple[float, str, bool]] = []
        # lease -> (prefilled at, last token at)
        self._leases: dict[str, tuple[float, float]] = {}

    def start(self, key: str, num_prompt: int, num_output: int, now: float) -> None:
        prefilled = now + num_prompt * self._costs.prefill_ms
        end = prefilled + num_output * self._token_ms
        self._leases[key] = (prefilled, end)
        heappush(self._heap, (prefilled + self._token_ms, key, False))
        heappush(self._heap, (end, key, True))

    def stop(self, key: str, now: float) -> int:
        prefilled, _ = self._leases.pop(key)
        self._heap = [entry for entry in self._heap if entry[1] != key]
        self._heap.sort()
        return max(0, int((now - prefilled) / self._token_ms))

    def redraw(self, draw: Callable[[str, int], int], now: float) -> dict[str, int]:
        """Give every lease another length: ``draw`` is told how much it has generated."""
        lengths = {}
        for key, (prefilled, _) in self._leases.items():
            num_so_far = max(0, int((now - prefilled) / self._token_ms))
            lengths[key] = max(num_so_far + 1, draw(key, num_so_far))
            self._leases[key] = prefilled, prefilled + lengths[key] * self._token_ms
        firsts = [entry for entry in self._heap if not entry[2]]
        self._heap = sorted(firsts + [(end, key, True) for key, (_, end) in self._leases.items()])
        return lengths

    def advance(self, now: float) -> list[Happening]:
        happened = []
        while self._heap and self._heap[0][0] <= now:
            _, key, is_end = heappop(self._heap)
            if is_end:
                del self._leases[key]
            happened.append((key, is_end))
        return happened

    def next_ms(self) -> float:
        return self._heap[0][0] if self._heap else inf


class FluidEngine:
    """Serial prefill, processor sharing in virtual time.

    Virtual time counts the tokens that each decoding sequence got so far, so the order in which
    sequences end never changes and every change of the batch costs O(log n).
    """

    def __init__(self, costs: Costs, num_slots: int) -> None:
        self._costs = costs
        # waiting for prefill or in it: (when it will be prefilled, lease, tokens to generate)
        self._prefills: deque[tuple[float, str, int]] = deque()
        # (virtual time, lease, is its end)
        self._heap: list[tuple[float, str, bool]] = []
        # decoding lease -> virtual time when it joined
        self._joined: dict[str, float] = {}
        self._virtual = 0.0
        self._at = 0.0

    def start(self, key: str, num_prompt: int, num_output: int, now: float) -> None:
        begin = self._prefills[-1][0] if self._prefills else now
        self._prefills.append((begin + num_prompt * self._costs.prefill_ms, key, num_output))

    def stop(self, key: str, now: float) -> int:
        self._move(now)
        if key in self._joined:
            self._heap = sorted(entry for entry in self._heap if entry[1] != key)
            return int(self._virtual - self._joined.pop(key))
        # the others keep their times: a stopped prefill gives nothing back
        self._prefills = deque(entry for entry in self._prefills if entry[1] != key)
        return 0

    def advance(self, now: float) -> list[Happening]:
        happened = []
        while (at := self.next_ms()) <= now:
            self._move(at)
            if self._prefills and self._prefills[0][0] <= at:
                _, key, num_output = self._prefills.popleft()
                self._joined[key] = self._virtual
                heappush(self._heap, (self._virtual + 1, key, False))
                heappush(self._heap, (self._virtual + num_output, key, True))
                continue
            # exactly on the mark, whatever the floats say
            self._virtual, key, is_end = heappop(self._heap)
            if is_end:
                del self._joined[key]
            happened.append((key, is_end))
        self._move(now)
        return happened

    def next_ms(self) -> float:
        prefilled = self._prefills[0][0] if self._prefills else inf
        if not self._heap:
            return prefilled
        left = max(0.0, self._heap[0][0] - self._virtual)
        return min(prefilled, self._at + left * self._costs.token_ms(len(self._joined)))

    def _move(self, at: float) -> None:
        """Let real time pass; the batch does not change on the way."""
        if self._joined and at > self._at:
            self._virtual += (at - self._at) / self._costs.token_ms(len(self._joined))
        self._at = max(self._at, at)


class StepEngine:
    """Iterations with chunked prefill; virtual time is the number of decode steps."""

    def __init__(self, costs: Costs, num_slots: int) -> None:
        self._costs = costs
        # waiting for prefill: [lease, prompt tokens to go, tokens to generate]
        self._prefills: deque[tuple[str, int, int]] = deque()
        # decoding lease -> number of the step before its first token
        self._joined: dict[str, int] = {}
        # (number of the step with its last token, lease)
        self._heap: list[tuple[int, str]] = []
        self._num_steps = 0
        # the running step: when it began, how long it takes (0: none runs), prompt tokens in it
        self._began = 0.0
        self._length = 0.0
        self._chunk = 0

    def start(self, key: str, num_prompt: int, num_output: int, now: float) -> None:
        self._prefills.append((key, num_prompt, num_output))
        if not self._length:
            self._began = now
            self._plan()

    def stop(self, key: str, now: float) -> int:
        if key in self._joined:
            self._heap = sorted(entry for entry in self._heap if entry[1] != key)
            return self._num_steps - self._joined.pop(key)
        # its share of the running chunk goes to whoever is next in the queue
        self._prefills = deque(entry for entry in self._prefills if entry[0] != key)
        return 0

    def advance(self, now: float) -> list[Happening]:
        happened: list[Happening] = []
        while self._length and self._began + self._length <= now:
            num_steps = 1
            if not self._prefills and self._heap:
                whole = int((now - self._began) / self._length)
                num_steps = max(1, min(whole, self._heap[0][0] - self._num_steps))
            self._began += self._length * num_steps
            self._num_steps += num_steps
            self._prefill(happened)
            while self._heap and self._heap[0][0] <= self._num_steps:
                _, key = heappop(self._heap)
                del self._joined[key]
                happened.append((key, True))
            self._plan()
        return happened

    def next_ms(self) -> float:
        if not self._length:
            return inf
        num_steps = 1
        if not self._prefills and self._heap:
            num_steps = max(1, self._heap[0][0] - self._num_steps)
        return self._began + self._length * num_steps

    def _prefill(self, happened: list[Happening]) -> None:
        """The chunk of the step that ended; a prompt's last chunk gives its first token."""
        while self._chunk and self._prefills:
            key, num_prompt, num_output = self._prefills.popleft()
            taken = min(num_prompt, self._chunk)
            self._chunk -= taken
            if taken < num_prompt:
                self._prefills.appendleft((key, num_prompt - taken, num_output))
                break
            self._joined[key] = self._num_steps - 1
            heappush(self._heap, (self._num_steps - 1 + num_output, key))
            happened.append((key, False))

    def _plan(self) -> None:
        """The next step takes in what is there now."""
        waiting = sum(num_prompt for _, num_prompt, _ in self._prefills)
        self._chunk = min(self._costs.chunk_tokens, waiting)
        self._length = 0.0
        if self._chunk or self._joined:
            batch = max(1, len(self._joined))
            self._length = self._costs.token_ms(batch) + self._chunk * self._costs.prefill_ms


ENGINES: dict[str, type[SlotEngine] | type[FluidEngine] | type[StepEngine]] = {
    "slot": SlotEngine,
    "fluid": FluidEngine,
    "step": StepEngine,
}


def whole_ms(at: float) -> int:
    """The first whole millisecond at which something has happened."""
    return ceil(at - 1e-6)
