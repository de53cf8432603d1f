"""Whether an executor's engine goes on, by the step counts in its heartbeats.

Rule: an engine stalls when it made no step for ``stall_timeout_ms`` in which it had leases and no
model on its way to the device, for steps pause while a model is loaded. One silence between two
heartbeats counts for half of that at most: it may have been us who stood still. A stall is cured by
a new process only, so the stalled one (its incarnation) is not let in again.
"""

from collections import OrderedDict


class Progress:
    """Of one session."""

    def __init__(self, stall_timeout_ms: int) -> None:
        self._stall_timeout_ms = stall_timeout_ms
        self._num_steps: int | None = None
        self._idle_ms = 0  # for so long it made no step and could have
        self._heard_ms = 0
        self._loading: set[str] = set()

    def load_began(self, model: str) -> None:
        """It was ordered, or goes on; steps pause until it is answered."""
        self._loading.add(model)

    def model_changed(self, model: str) -> None:
        """The answer, or other news of a model."""
        self._loading.discard(model)

    def is_stalled(self, num_steps: int, *, has_leases: bool, now_ms: int) -> bool:
        """What a heartbeat says."""
        if num_steps != self._num_steps or not has_leases or self._loading:
            self._num_steps, self._idle_ms = num_steps, 0
        else:
            self._idle_ms += min(now_ms - self._heard_ms, self._stall_timeout_ms // 2)
        self._heard_ms = now_ms
        return self._idle_ms >= self._stall_timeout_ms


class Stalled:
    """The processes that stalled: the latest of each executor, at most ``max_executors``."""

    def __init__(self, max_executors: int) -> None:
        self._max_executors = max_executors
        self._incarnations: OrderedDict[str, str] = OrderedDict()

    def add(self, executor_id: str, incarnation: str) -> None:
        """It is to start anew."""
        self._incarnations[executor_id] = incarnation
        self._incarnations.move_to_end(executor_id)
        if len(self._incarnations) > self._max_executors:
            self._incarnations.popitem(last=False)

    def has(self, executor_id: str, incarnation: str) -> bool:
        """Whether this process stalled; a new one of the same executor clears it."""
        known = self._incarnations.get(executor_id)
        if known is not None and known != incarnation:
            del self._incarnations[executor_id]
        return known == incarnation
