"""The models that wait for a place: somebody waits for them, and they are nowhere.

Rule: a model is nowhere if it has no home and is on its way to none. Asked far more often than it
changes, so the answer is kept until fleet or queue say that it may have.
"""

from scheduler_svc.core.fleet import Fleet
from scheduler_svc.core.queue import Queue


class Nowhere:
    """Waiting models without a place."""

    def __init__(self, queue: Queue, fleet: Fleet) -> None:
        self._queue = queue
        self._fleet = fleet
        self._found: tuple[str, ...] = ()
        # the versions of fleet and queue that this was of
        self._found_of = (-1, -1)

    def models(self) -> tuple[str, ...]:
        """All of them, by when they began to wait."""
        fleet, queue = self._fleet, self._queue
        version = (fleet.version, queue.version)
        if version != self._found_of:
            self._found = tuple(model for model in queue.num_by_model if not fleet.warmth(model))
            self._found_of = version
        return self._found
