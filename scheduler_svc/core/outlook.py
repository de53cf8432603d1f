"""When a model that has no place will get one: which executor runs out of work, and whose turn it
is then.

Rule: an executor goes on with its models while somebody waits for them; idle, it goes to the model
with the largest claim, or to those that are due in their turn (priority.py). So with n such models
before it, a model waits until n + 1 executors ran out of work. What work there is, is counted:
those who wait for an executor's models, spread over their homes, and half of what runs. Who will
come, drains and the switch budget are left to what is learned (calibration.py).

Cost: at most ``_MOST`` executors are looked at, as a sample of all that could load the model.
"""

from collections.abc import Callable
from itertools import islice
from typing import Final

from scheduler_svc.core.domain import ExecutorRecord
from scheduler_svc.core.fleet import Fleet
from scheduler_svc.core.nowhere import Nowhere
from scheduler_svc.core.queue import Queue

_MOST: Final = 16


class Outlook:
    """Looks ahead from the queue and the fleet as they are.

    ``slot_ms``: mean slot-milliseconds of a model's leases. ``due_ms``: for how long a model has
    waited for a place until now, 0 as long as it is not due.
    """

    def __init__(
        self,
        queue: Queue,
        fleet: Fleet,
        slot_ms: Callable[[str], float],
        due_ms: Callable[[str, int], int],
    ) -> None:
        self._queue = queue
        self._fleet = fleet
        self._slot_ms = slot_ms
        self._due_ms = due_ms
        self._nowhere = Nowhere(queue, fleet)

    def place_in_ms(self, model: str, now_ms: int) -> float:
        """When an executor will begin to load the model; some executor could."""
        groups = self._fleet.offer(model).groups
        num = sum(len(group.members) for group in groups)
        members = (executor for group in groups for executor in group.members.values())
        free_ms = sorted(
            self._free_in_ms(executor, now_ms)
            for executor in islice(members, _MOST)
            if executor.is_serving
        )
        if not free_ms:
            return 0.0
        laps, place = divmod(self._num_before(model, now_ms) * min(num, _MOST) // num, len(free_ms))
        return laps * free_ms[-1] + free_ms[place]

    def _num_before(self, model: str, now_ms: int) -> int:
        """How many models without a place go before this one."""
        own = self._turn(model, now_ms)
        return sum(
            other != model and self._turn(other, now_ms) > own for other in self._nowhere.models()
        )

    def _turn(self, model: str, now_ms: int) -> tuple[int, int]:
        return self._due_ms(model, now_ms), self._queue.waited_ms(model, now_ms)

    def _free_in_ms(self, executor: ExecutorRecord, now_ms: int) -> float:
        """When it has nothing left to do, if nobody comes."""
        fleet, load = self._fleet, executor.loading
        models, left_ms = list(executor.residences), 0.0
        if load is not None:
            models.append(load.model)
            left_ms = max(0.0, load.since_ms + (load.load_ms or 0) - now_ms)
        work_ms = longest_ms = 0.0
        for model in models:
            num_waiting = self._queue.num_by_model.get(model, 0)
            num_active = executor.active.get(model, 0)
            if num_waiting or num_active:
                slot_ms = self._slot_ms(model)
                num_homes = len(fleet.homes.get(model, ())) + len(fleet.loading.get(model, ()))
                work_ms += (num_waiting / max(1, num_homes) + num_active / 2) * slot_ms
                longest_ms = max(longest_ms, slot_ms)
        # the slots do not become idle at once: the last lease ends later than the mean one
        return left_ms + work_ms / executor.num_slots + longest_ms / 2
