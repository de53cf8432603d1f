"""A limit for how long a client may take nothing."""

import asyncio
from collections.abc import Callable


class StallGuard:
    """Cuts the connection and cancels the current task when one write takes too long.

    A look at the clock now and then costs less than a timer for every token.
    """

    def __init__(self, limit_s: float, abort: Callable[[], None] | None) -> None:
        self._limit_s = limit_s
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(limit_s, self._look)
        self.writing_since: float | None = None
        self.has_stalled = False

    def close(self) -> None:
        """Stop looking."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        since = self.writing_since if self.writing_since is not None else now
        if now - since >= self._limit_s:
            assert self._task is not None
            self.has_stalled = True
            if self._abort is not None:
                self._abort()
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(since + self._limit_s - now, self._look)
