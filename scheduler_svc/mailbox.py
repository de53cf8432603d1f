"""The queue of events in front of the core.

Bounded by patience, not by refusal: a fact that a peer told cannot be thrown away, so each reader
awaits ``room`` before it reads on. The mailbox then holds at most its limit and one message of
each peer.
"""

import asyncio
from collections import deque

from headway.bell import Bell
from scheduler_svc.core.messages import Event


class Mailbox:
    """Many writers, one reader."""

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._events: deque[Event] = deque()
        self._loop = asyncio.get_running_loop()
        self._has_mail = Bell(self._loop)
        self._has_room = asyncio.Event()
        self._has_room.set()
        # wakes the reader; one for all waits, as most of them end early
        self._alarm: asyncio.TimerHandle | None = None

    def put(self, event: Event) -> None:
        """Always succeeds."""
        self._events.append(event)
        self._has_mail.set()
        if len(self._events) >= self._max_events:
            self._has_room.clear()

    async def room(self) -> None:
        """Returns when the mailbox is below its limit."""
        await self._has_room.wait()

    async def wait(self, timeout_ms: int | None) -> None:
        """Until there is mail, or the time is over; it may end before either."""
        if timeout_ms is not None and not self._has_mail.is_set():
            self._set_alarm(timeout_ms / 1_000)
        await self._has_mail.wait()

    def take(self, max_events: int) -> list[Event]:
        """The oldest events, in order."""
        num_events = min(len(self._events), max_events)
        events = [self._events.popleft() for _ in range(num_events)]
        if not self._events:
            self._has_mail.clear()
        if len(self._events) < self._max_events:
            self._has_room.set()
        return events

    def _set_alarm(self, wait_s: float) -> None:
        due_s = self._loop.time() + wait_s
        if self._alarm is not None:
            if self._alarm.when() <= due_s:
                return
            self._alarm.cancel()
        self._alarm = self._loop.call_at(due_s, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._has_mail.set()
