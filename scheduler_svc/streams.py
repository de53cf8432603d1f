"""One peer on one bidirectional stream: its reader, its writer, its pulse.

Rules of grpc.aio that this file keeps (docs/adr/0003-grpc-aio.md): one reader task and one writer
for each stream; never a timeout around a read or a write; what gathers while a write is under way
goes into the next message; clean-up hangs on the call, not on a generator's mercy. A message costs
more than what is in it, so the writer also lets one turn of the event loop pass before it takes:
the end of a request is decided in the turn after its last tokens came.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar, cast

import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from headway.bell import Bell
from headway.errors import INTERNAL_MESSAGE, HeadwayError
from headway.reasons import Reason
from scheduler_svc.settings import SchedulerSettings

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

_log = structlog.get_logger()


Context = grpc.aio.ServicerContext[Any, Any]


def on_call_end(context: Context, callback: Callable[[], None]) -> None:
    """Have it called when the call is over, whatever ended it."""
    # the stubs want a class of their own where any callable does
    context.add_done_callback(cast("Any", lambda _: callback()))


class HasPulse(Protocol):
    """A call whose peer may look dead."""

    def check_pulse(self, now_ms: int) -> None:
        """Cut the call if it does; see to it that we do not."""


class Pulse:
    """Every open stream; cuts those whose peer is silent or takes nothing, and keeps ours alive."""

    def __init__(self, settings: SchedulerSettings, clock_ms: Callable[[], int]) -> None:
        self.settings = settings
        self.clock_ms = clock_ms
        self.streams: set[HasPulse] = set()

    async def run(self) -> None:
        """Runs until cancelled."""
        felt_ms = self.clock_ms()
        while True:
            await asyncio.sleep(self.settings.heartbeat_interval_ms / 2_000)
            before_ms, felt_ms = felt_ms, self.clock_ms()
            if felt_ms - before_ms > self.settings.heartbeat_interval_ms:
                continue  # it was us who stood still: what peers sent meanwhile is yet to be read
            for stream in list(self.streams):
                stream.check_pulse(felt_ms)


class PeerStream(ABC, Generic[RequestT, ResponseT]):
    """The shell's end of one stream. Subclasses say what messages mean."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._loop = asyncio.get_running_loop()
        self._wake = Bell(self._loop)
        self._taken = asyncio.Event()
        self._is_closed = False
        self._has_ended = False
        self._error: HeadwayError | None = None
        self._reading_since_ms: int | None = None
        self._writing_since_ms: int | None = None
        self._wrote_ms = 0
        self._is_beat_due = False
        self._late_wake: asyncio.TimerHandle | None = None
        self._reader: asyncio.Task[None] | None = None

    @abstractmethod
    async def on_message(self, message: RequestT) -> None:
        """Handle one message of the peer. Raises HeadwayError to end the stream."""

    @abstractmethod
    def take(self) -> ResponseT | None:
        """The next message for the peer: everything that gathered. None if nothing did."""

    @abstractmethod
    def num_answers(self) -> int:
        """Answers that wait to be taken; above the limit the peer is not read."""

    @abstractmethod
    def heartbeat(self) -> ResponseT | None:
        """A sign of life; None as long as the first message is not out."""

    @abstractmethod
    def on_end(self) -> None:
        """Nothing is read or sent any more, though a call that was cut may yet be open; called
        once."""

    def wake(self) -> None:
        """There is something to take."""
        self._wake.set()

    def wake_within(self, wait_ms: int) -> None:
        """There is something to take that can wait for company."""
        if self._late_wake is None:
            self._late_wake = self._loop.call_later(wait_ms / 1_000, self.wake)

    def close(self, error: HeadwayError | None) -> None:
        """End the stream soon, with this error."""
        if not self._is_closed:
            self._is_closed = True
            self._error = error
            self._wake.set()

    async def run(
        self,
        requests: AsyncIterator[RequestT],
        context: Context,
    ) -> AsyncIterator[ResponseT]:
        """The call's handler."""
        try:
            self._pulse.streams.add(self)
            on_call_end(context, self._end)
            await context.send_initial_metadata(())
            self._reader = asyncio.create_task(self._read(requests))
            while not self._is_closed:
                message = self.take()
                self._taken.set()
                self._stop_late_wake()
                if message is None and self._is_beat_due:
                    message = self.heartbeat()
                self._is_beat_due = False
                if message is None:
                    await self._wake.wait()
                    await asyncio.sleep(0)
                    self._wake.clear()
                    continue
                self._writing_since_ms = self._wrote_ms = self._pulse.clock_ms()
                yield message
                self._writing_since_ms = None
            if self._error is not None:
                raise self._error
        finally:
            self._end()

    def _stop_late_wake(self) -> None:
        if self._late_wake is not None:
            self._late_wake.cancel()
            self._late_wake = None

    async def _read(self, requests: AsyncIterator[RequestT]) -> None:
        try:
            self._reading_since_ms = self._pulse.clock_ms()
            async for message in requests:
                self._reading_since_ms = None
                if self._is_closed:  # its end waits for the writer; it has no say any more
                    return
                await self.on_message(message)
                while self.num_answers() > self._pulse.settings.max_unread_answers:
                    self._taken.clear()
                    await self._taken.wait()
                self._reading_since_ms = self._pulse.clock_ms()
            self.close(None)
        except HeadwayError as error:
            self.close(error)
        except DecodeError:
            self.close(HeadwayError(Reason.INVALID_REQUEST, "The message cannot be decoded."))
        except Exception as error:
            _log.error("stream.failed", exc_info=error)
            self.close(HeadwayError(Reason.INTERNAL, INTERNAL_MESSAGE))

    def check_pulse(self, now_ms: int) -> None:
        """Cut the stream if its peer looks dead, and show that we are not: half an interval after
        the last message, for the next look may come as late again."""
        settings = self._pulse.settings
        reading_ms, writing_ms = self._reading_since_ms, self._writing_since_ms
        if reading_ms is not None and now_ms - reading_ms > settings.heartbeat_timeout_ms:
            self._cut("The peer was silent for too long.")
        elif writing_ms is not None and now_ms - writing_ms > settings.write_timeout_ms:
            self._cut("The peer took nothing for too long.")
        elif writing_ms is None and 2 * (now_ms - self._wrote_ms) >= settings.heartbeat_interval_ms:
            self._is_beat_due = True
            self._wake.set()

    def _cut(self, message: str) -> None:
        """Let go of everything now. A write under way cannot be abandoned: cancelling its task
        would leave the call open for ever, so the handler ends when the write does."""
        self.close(HeadwayError(Reason.NO_CAPACITY, message))
        self._end()

    def _end(self) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._is_closed = True
        self._pulse.streams.discard(self)
        self._stop_late_wake()
        if self._reader is not None:
            self._reader.cancel()
        self.on_end()


class Places:
    """How many calls of one kind may be open at once."""

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places

    def take(self, context: Context) -> None:
        """For as long as the call is open: one that we cut but that cannot end, because its peer
        takes nothing, still counts. Raises HeadwayError QUOTA_EXCEEDED if there is none."""
        if self._num_free <= 0:
            raise HeadwayError(Reason.QUOTA_EXCEEDED, "Too many calls of this kind are open.")
        self._num_free -= 1
        on_call_end(context, self._give_back)

    def _give_back(self) -> None:
        self._num_free += 1
