"""Which requests of a group have ended, for whoever reads results in any order.

Rule: ends of all groups are numbered together, upwards from a number that no earlier start of the
scheduler has reached; a reader's cursor is the number of the last end that it was told. So a cursor
from before a restart, or from before its group was forgotten, misses nothing that is still known.
``now_ms`` is monotonic milliseconds.

Bounded three ways: an end is kept ``ttl_ms``, a group its last ``max_ends``, and of all groups the
``max_groups`` in which something ended last.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from headway.v1 import scheduler_pb2 as scheduler

Group = tuple[str, str]  # (tenant, name)


@dataclass(frozen=True, slots=True)
class _End:
    number: int
    expires_ms: int
    finished: scheduler.FinishedRequest


class Groups:
    """The logs of all groups, and who waits for the next end of one."""

    def __init__(self, *, first: int, ttl_ms: int, max_groups: int, max_ends: int) -> None:
        self._last = first
        self._ttl_ms = ttl_ms
        self._max_groups = max_groups
        self._max_ends = max_ends
        # in the order of their last ends
        self._logs: OrderedDict[Group, deque[_End]] = OrderedDict()
        self._waiters: dict[Group, list[Callable[[], None]]] = {}
        # when each was last asked for, in that order; at most max_groups
        self._asked_ms: OrderedDict[Group, int] = OrderedDict()
        # the same of the one that was forgotten last: no forgotten one was asked for later
        self._forgotten_ms = 0

    def __len__(self) -> int:
        return len(self._logs)

    def add(self, group: Group, finished: scheduler.FinishedRequest, now_ms: int) -> None:
        """A request of a group has ended: its result can be read."""
        self._last += 1
        log = self._logs.get(group)
        if log is None:
            log = self._logs[group] = deque(maxlen=self._max_ends)
        log.append(_End(self._last, now_ms + self._ttl_ms, finished))
        self._logs.move_to_end(group)
        self.expire(now_ms)
        for wake in self._waiters.pop(group, ()):
            wake()

    def since(
        self, group: Group, cursor: int, now_ms: int
    ) -> tuple[list[scheduler.FinishedRequest], int]:
        """Ends after the cursor, in order, and the next cursor."""
        self.expire(now_ms)
        self._asked_ms[group] = now_ms
        self._asked_ms.move_to_end(group)
        if len(self._asked_ms) > self._max_groups:
            _, self._forgotten_ms = self._asked_ms.popitem(last=False)
        if cursor > self._last:  # of an earlier start, and the clock was set back since
            cursor = 0
        news: list[_End] = []
        for end in reversed(self._logs.get(group, ())):
            if end.number <= cursor:
                break
            if end.expires_ms > now_ms:
                news.append(end)
        news.reverse()
        return [end.finished for end in news], news[-1].number if news else cursor

    def asked_ms(self, group: Group, now_ms: int) -> int:
        """When somebody last asked for the group, at the latest; 0: never, or it has no name."""
        if not group[1]:
            return 0
        if group in self._waiters:
            return now_ms
        return self._asked_ms.get(group, self._forgotten_ms)

    def watch(self, group: Group, wake: Callable[[], None]) -> None:
        """Have it called once, at the next end."""
        self._waiters.setdefault(group, []).append(wake)

    def unwatch(self, group: Group, wake: Callable[[], None]) -> None:
        """It need not be called any more; fine if it was."""
        waiters = self._waiters.get(group, [])
        if wake in waiters:
            waiters.remove(wake)
            if not waiters:
                del self._waiters[group]

    def expire(self, now_ms: int) -> None:
        """Forget groups whose last end is too old, and those above the limit."""
        while self._logs:
            group, log = next(iter(self._logs.items()))
            if log[-1].expires_ms > now_ms and len(self._logs) <= self._max_groups:
                return
            del self._logs[group]
