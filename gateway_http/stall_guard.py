"""A limit for how little a client may take of a stream.

What a client has not taken is in three places: in the kernel (``max_unsent_bytes``), in the
connection's own buffer (one write, and 64 KiB of earlier ones), and, because the writer waits for
that buffer, as tokens that nobody has made text of (``max_unread_tokens``). A client that takes
nothing for ``stream_write_timeout_s``, or that falls behind by too many tokens, is cut off; whoever
can name the stream's last event may come back for the rest.
"""

import asyncio
from typing import Literal, Protocol

Cause = Literal["stalled", "behind"]
_NUM_LOOKS = 4  # within the time limit


class Connection(Protocol):
    """What we need of a transport."""

    def get_write_buffer_size(self) -> int:
        """Bytes that the kernel has not taken."""

    def abort(self) -> None:
        """Close at once, whatever was not sent."""


class StreamCutError(Exception):
    """A stream that was cut off, because its client did not take it; ``name`` as in its ids."""

    def __init__(self, cause: Cause, name: str, is_resumable: bool) -> None:
        super().__init__(cause)
        self.cause = cause
        self.name = name
        self.is_resumable = is_resumable


class StallGuard:
    """Cuts the connection and cancels the current task when the client takes too little.

    Whoever writes says so: ``num_writes`` counts what was begun, ``is_writing`` is set until it is
    through. A few looks in ``limit_s`` cost less than a timer for every token. All of them must
    find the same write and the same number of bytes before it: a reader that takes anything is
    left alone, and a gateway that was held up itself has not looked.
    """

    def __init__(self, limit_s: float, connection: Connection | None) -> None:
        self._interval_s = limit_s / _NUM_LOOKS
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._seen: tuple[int, int] | None = None
        self._num_idle_looks = 0
        self._timer = self._loop.call_later(self._interval_s, self._look)
        self.num_writes = 0
        self.is_writing = False
        self.cause: Cause | None = None

    def close(self) -> None:
        """Stop looking."""
        self._timer.cancel()

    def fall_behind(self) -> None:
        """More is waiting than may: only a client that holds up the writer is to blame."""
        if self.is_writing:
            self._cut("behind")

    def _look(self) -> None:
        size = self._connection.get_write_buffer_size() if self._connection is not None else 0
        now = (self.num_writes, size) if self.is_writing else None
        is_idle = now is not None and now == self._seen
        self._num_idle_looks = self._num_idle_looks + 1 if is_idle else 0
        self._seen = now
        if self._num_idle_looks == _NUM_LOOKS:
            self._cut("stalled")
        else:
            self._timer = self._loop.call_later(self._interval_s, self._look)

    def _cut(self, cause: Cause) -> None:
        if self.cause is not None:
            return
        self.cause = cause
        self.close()
        if self._connection is not None:
            self._connection.abort()
        assert self._task is not None
        self._task.cancel()
