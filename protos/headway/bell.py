"""What one task waits for, and others ring: an asyncio.Event that makes no system call.

asyncio.Event asks which loop runs, at every wait, and CPython 3.11 answers that by asking for the
process's id. On a busy machine the end of any system call is where a process is put aside for
another one, which costs far more than the call itself.
"""

import asyncio


class Bell:
    """Rung until it is cleared. It belongs to one event loop, and one task at a time waits."""

    __slots__ = ("_is_set", "_loop", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def is_set(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._is_set

    def set(self) -> None:
        """Ring: whoever waits goes on, even if it is cleared before that."""
        self._is_set = True
        if self._waiter is not None:
            if not self._waiter.done():  # its task was cancelled
                self._waiter.set_result(None)
            self._waiter = None

    def clear(self) -> None:
        """From here on ``wait`` waits."""
        self._is_set = False

    async def wait(self) -> None:
        """Until it is rung."""
        if not self._is_set:
            assert self._waiter is None or self._waiter.done(), "one task at a time"
            self._waiter = self._loop.create_future()
            await self._waiter
