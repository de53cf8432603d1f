"""The method that the core replaced: give everybody a priority, sort them all, place in turn."""

import random
import statistics
import time
from dataclasses import dataclass

from bench.core.load import NUM_OFFERED, NUM_RESIDENT, Scale


@dataclass(slots=True)
class Entry:
    """A waiting request of the reference."""

    model: str
    arrived_s: float


class SortEverything:
    """llamacpp-ha's dispatch cycle, as published, without sessions and timeouts."""

    bonus, equalization_s = 10.0, 30.0

    def __init__(self, scale: Scale, num_queued: int) -> None:
        self._random = random.Random(3)
        self._models = [f"model-{number}" for number in range(scale.num_models)]
        self._capacity = scale.num_slots
        self._max_models = NUM_RESIDENT
        count = scale.num_reference_backends
        # backend -> model -> requests that run
        self.active: list[dict[str, int]] = [{} for _ in range(count)]
        self.acquired = [0] * count
        self._serving: dict[str, list[int]] = {model: [] for model in self._models}
        for backend in range(count):
            for offset in range(NUM_OFFERED):
                number = (backend * NUM_RESIDENT + offset) % scale.num_models
                self._serving[self._models[number]].append(backend)
            for offset in range(self._capacity):
                number = (backend * NUM_RESIDENT + offset % NUM_RESIDENT) % scale.num_models
                self._acquire(backend, self._models[number])
        self.pending: list[Entry] = []
        self._now_s = 0.0
        for _ in range(num_queued):
            self._enqueue()
        self._now_s += 1.0

    def _enqueue(self) -> None:
        self._now_s += 1e-4
        self.pending.append(Entry(self._random.choice(self._models), self._now_s))

    def decide(self) -> int:
        """Nanoseconds of one cycle after a release and an arrival."""
        busy = [backend for backend, used in enumerate(self.acquired) if used]
        backend = self._random.choice(busy)
        model = self._random.choice(sorted(self.active[backend]))
        start = time.thread_time_ns()
        self.acquired[backend] -= 1
        self.active[backend][model] -= 1
        if not self.active[backend][model]:
            del self.active[backend][model]
        self._enqueue()
        self._cycle()
        return time.thread_time_ns() - start

    def _cycle(self) -> None:
        entries = sorted(self.pending, key=self._priority, reverse=True)
        rest: list[Entry] = []
        reserved: dict[int, str] = {}
        represented: set[str] = set()
        for entry in entries:  # the diversity pass
            if entry.model in represented or self._is_warm(entry.model):
                rest.append(entry)
            elif self._place(entry, reserved):
                represented.add(entry.model)
            else:
                drained = self._drain(entry.model)
                if drained is not None:
                    reserved[drained] = entry.model
                rest.append(entry)
        for entry in rest:  # the priority pass
            self._place(entry, reserved)

    def _priority(self, entry: Entry) -> float:
        waited_s = self._now_s - entry.arrived_s
        warm = self.bonus if self._is_warm(entry.model) else 0.0
        return waited_s * (self.bonus / self.equalization_s) + warm

    def _is_warm(self, model: str) -> bool:
        return any(model in self.active[backend] for backend in self._serving[model])

    def _can_accept(self, backend: int, model: str) -> bool:
        active = self.active[backend]
        return self.acquired[backend] < self._capacity and (
            model in active or len(active) < self._max_models
        )

    def _place(self, entry: Entry, reserved: dict[int, str]) -> bool:
        usable = [
            backend
            for backend in self._serving[entry.model]
            if self._can_accept(backend, entry.model)
            and reserved.get(backend, entry.model) == entry.model
        ]
        if not usable:
            return False
        self._acquire(min(usable, key=lambda backend: self.acquired[backend]), entry.model)
        self.pending.remove(entry)
        return True

    def _drain(self, model: str) -> int | None:
        free = [
            backend for backend in self._serving[model] if self.acquired[backend] < self._capacity
        ]
        eligible = [
            backend
            for backend in free
            if all(len(self._serving[other]) > 1 for other in self.active[backend])
        ]
        return min(eligible, key=lambda backend: self.acquired[backend], default=None)

    def _acquire(self, backend: int, model: str) -> None:
        self.acquired[backend] += 1
        self.active[backend][model] = self.active[backend].get(model, 0) + 1


def measure_reference(scale: Scale, num_queued: int) -> dict[str, float]:
    """Time the reference's cycles at a queue length."""
    print(f"sort everything, {num_queued:,} queued:", flush=True)
    reference = SortEverything(scale, num_queued)
    spent = [reference.decide() for _ in range(scale.num_reference_decisions)]
    mean_us = statistics.fmean(spent) / 1e3
    print(f"    {1e6 / mean_us:,.0f} decisions/s, mean {mean_us / 1e3:.2f} ms", flush=True)
    return {
        "num_queued": num_queued,
        "num_backends": scale.num_reference_backends,
        "decisions_per_s": round(1e6 / mean_us, 1),
        "mean_us": round(mean_us, 1),
        "max_ms": round(max(spent) / 1e6, 2),
    }
