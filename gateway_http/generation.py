"""One request that is followed, as the gateway's handlers see it: events in order, one end."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gateway_http.core.messages import (
    Accepted,
    Ended,
    Positioned,
    SampleEnded,
    Scored,
    Stream,
    Tokens,
)
from gateway_http.core.streams import Streams
from gateway_http.translate import to_error, unreachable
from headway.bell import Bell
from headway.errors import HeadwayError
from headway.v1 import generation_pb2, scheduler_pb2


@dataclass(slots=True)
class Finish:
    """Last event of a generation; ``error`` is set when it did not succeed."""

    usage: generation_pb2.Usage
    timing: generation_pb2.Timing
    error: HeadwayError | None


SampleEvent = Tokens | SampleEnded
Event = Positioned | Scored | SampleEvent | Finish


class Generation:
    """One request that is followed to its end.

    ``SampleEnded.detail`` is the SequenceEnd, ``Positioned.status`` the QueueStatus and
    ``Scored.scores`` the PromptScores. Leaving the context early cancels the request, unless it is
    kept (see ``SchedulerClient.generate``).
    """

    def __init__(
        self,
        streams: Streams,
        on_command: Callable[[], None],
        accept_timeout_s: float,
        loop: asyncio.AbstractEventLoop,
        changed: Bell,
    ) -> None:
        self._streams = streams
        self._on_command = on_command
        self._accept_timeout_s = accept_timeout_s
        self._loop = loop
        self._stream: Stream | None = None
        self._accepted: Accepted | None = None
        self._events: deque[Event] = deque()
        self._finish: Finish | None = None
        self._max_unread = 0
        self._on_too_many: Callable[[], None] | None = None
        self._is_late = False
        self.changed = changed

    def start(self, stream: Stream) -> None:
        """This is its stream; before anything else."""
        self._stream = stream

    async def accepted(self) -> Accepted:
        """Wait until the scheduler has it. Raises its refusal, or NO_CAPACITY after a while."""
        timer = self._loop.call_later(self._accept_timeout_s, self._give_up)
        try:
            while True:
                self._read()
                if self._accepted is not None:
                    return self._accepted
                if self._finish is not None:
                    raise self._finish.error or unreachable()
                if self._is_late:
                    self.cancel()
                    raise unreachable()
                await self.changed.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self._is_late = True
        self.changed.set()

    def cancel(self) -> None:
        """Nobody listens any more; the events end with CANCELLED. Harmless when it has ended."""
        assert self._stream is not None
        self._streams.cancel(self._stream)
        self._on_command()

    def limit_unread(self, max_tokens: int, on_too_many: Callable[[], None]) -> None:
        """Call ``on_too_many`` when more tokens, and alternatives of tokens, wait to be read."""
        self._max_unread = max_tokens
        self._on_too_many = on_too_many

    def on_change(self) -> None:
        """The stream has news."""
        if not self.changed.is_set():
            self.changed.set()
        elif self._on_too_many is not None:  # the reader has not come since the last change
            assert self._stream is not None
            if self._stream.num_unread > self._max_unread:
                self._on_too_many()

    def poll(self) -> list[Event]:
        """What is new, without waiting; clears ``changed``."""
        self._read()
        events = list(self._events)
        self._events.clear()
        return events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while True:
            if not self._events:
                self._read()
            if self._events:
                return self._events.popleft()
            if self._finish is not None:
                raise StopAsyncIteration
            await self.changed.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def _read(self) -> None:
        assert self._stream is not None
        self.changed.clear()
        for event in self._stream.read():
            if isinstance(event, Accepted):
                self._accepted = event
                if self._stream.wants_positions:
                    self._events.append(Positioned(event.status))
            elif isinstance(event, Ended):
                self._finish = _finish(event)
                self._events.append(self._finish)
            else:
                self._events.append(event)


def _finish(ended: Ended) -> Finish:
    error = to_error(ended.failure) if ended.failure is not None else None
    finished = ended.detail if ended.detail is not None else scheduler_pb2.Finished()
    return Finish(finished.usage, finished.timing, error)
