"""llamacpp-ha 0.14 as it was published, its faults included (W1 to W15 in docs/scheduling.md).

One dispatch cycle sorts by priority, places one request of each model that is warm nowhere,
reserves backends for those it could not place, then places the rest in order with least
connections. Reservations live for one cycle; warmth is "active or held on any live backend";
residency is no input.

What it does for every entry, this does once for each model, with the same result: entries of one
model differ in age only, and one that found no place proves it for all behind it in the cycle
(places only fill up). So W10, the cost, does not show. Nor does W2, since the clock stands still
while a cycle sorts. Sessions and failover are left out: no trace here has sessions.

With a bonus of 0 and no hold it is FIFO with least connections.
"""

from collections import Counter
from heapq import heapify, heappop, heapreplace

from bench.sim.reference import Backend, ReferencePolicy

_EQUALIZATION_MS = 30_000
_IDLE_WAKE_MS = 5_000
_LEAST_WAKE_MS = 1_000


class LlamaCppHa(ReferencePolicy):
    """Queue, slot tracker and scheduler of Part A."""

    def __init__(self, bonus: int, hold_ms: int) -> None:
        super().__init__()
        self._bonus = bonus
        self._hold_ms = hold_ms
        # for ties of least connections, by model
        self._turns: Counter[str] = Counter()
        self._cycle_ms = 0

    def _wake_ms(self) -> int | None:
        if not self._queues:
            return None
        return self._cycle_ms + max(_LEAST_WAKE_MS, self._hold_ms or _IDLE_WAKE_MS)

    def _released(self, backend: Backend, model: str) -> None:
        if not backend.active and self._hold_ms:
            backend.held_model, backend.held_until_ms = model, self._now_ms + self._hold_ms

    # --- slot tracker ---------------------------------------------------------------------

    def _is_held_for_other(self, backend: Backend, model: str) -> bool:
        return backend.held_model not in (None, model) and backend.held_until_ms > self._now_ms

    def _can_accept(self, backend: Backend, model: str) -> bool:
        return (
            backend.num_free > 0
            and not self._is_held_for_other(backend, model)
            and backend.has_room_for(model)
        )

    def _is_warm(self, model: str) -> bool:
        """On any live backend: in flight, or inside its hold."""
        return any(
            model in backend.active
            or (backend.held_model == model and backend.held_until_ms > self._now_ms)
            for backend in self._serving(model)
        )

    # --- one cycle ------------------------------------------------------------------------

    def _cycle(self) -> None:
        self._cycle_ms = self._now_ms
        if not any(backend.num_free for backend in self._backends.values()):
            return  # nothing can be placed, waived or reserved
        # warmth as it is when the cycle sorts, worth this much earlier an arrival
        lead_ms = {
            model: _EQUALIZATION_MS if self._bonus and self._is_warm(model) else 0
            for model in self._queues
        }
        # model -> backend that only it may use in this cycle
        reserved: dict[str, str] = {}
        if self._bonus:
            for _, _, model in sorted(self._key(model, lead) for model, lead in lead_ms.items()):
                self._diversify(model, reserved)
        heap = [self._key(model, lead_ms[model]) for model in self._queues]
        heapify(heap)
        while heap:
            model = heap[0][2]
            if self._place(model, reserved) and model in self._queues:
                heapreplace(heap, self._key(model, lead_ms[model]))
            else:
                heappop(heap)

    def _key(self, model: str, lead_ms: int) -> tuple[int, int, str]:
        """Priority of a model's oldest request, highest first.

        bonus x (wait / equalization + is warm) falls as arrival - equalization x is warm rises.
        """
        head = self._queues[model][0]
        return head.accepted_ms - lead_ms, head.arrival, model

    def _diversify(self, model: str, reserved: dict[str, str]) -> None:
        """A model that is warm nowhere gets one place, or a backend to itself."""
        if self._is_warm(model):
            return
        for backend in self._serving(model):
            # the waiver, on all of them
            if (
                backend.num_free
                and self._is_held_for_other(backend, model)
                and backend.has_room_for(model)
            ):
                backend.held_model = None
        if not self._place(model, reserved):
            drained = self._choose_drain(model)
            if drained is not None:
                reserved[model] = drained

    def _choose_drain(self, model: str) -> str | None:
        """Blocked by the model limit only, and no model there loses its last home."""
        candidates = [
            backend
            for backend in self._serving(model)
            if backend.num_free
            and not backend.has_room_for(model)
            and all(self._has_other_home(active, backend) for active in backend.active)
        ]
        if not candidates:
            return None
        return max(candidates, key=lambda backend: backend.num_free).executor_id

    def _has_other_home(self, model: str, backend: Backend) -> bool:
        return any(other is not backend for other in self._serving(model))

    def _place(self, model: str, reserved: dict[str, str]) -> bool:
        """Least connections over whoever accepts and is not reserved for another."""
        taken = {executor_id for owner, executor_id in reserved.items() if owner != model}
        candidates = [
            backend
            for backend in self._serving(model)
            if backend.executor_id not in taken and self._can_accept(backend, model)
        ]
        if not candidates:
            return False
        least = min(len(backend.running) / backend.num_slots for backend in candidates)
        tied = [b for b in candidates if len(b.running) / b.num_slots == least]
        self._grant(tied[self._turns[model] % len(tied)], model)
        self._turns[model] += 1
        return True
