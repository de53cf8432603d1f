"""The one Open stream to the scheduler: kept alive, or replaced.

One task reads, one writes, two watch the clock; whichever ends first ends the connection, and the
next address of the list is tried after a jittered pause. Reads and writes are never put under
``wait_for``: a timeout there would cancel the whole stream.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from functools import cached_property
from typing import NamedTuple

import grpc.aio
import structlog
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2_grpc

from gateway_http.core.messages import Failure
from gateway_http.core.streams import Streams
from gateway_http.settings import GatewaySettings
from gateway_http.translate import apply_updates, encode_commands, unreachable
from headway.bell import Bell
from headway.errors import from_rpc_error
from headway.reasons import Reason
from headway.server import connect
from headway.v1 import scheduler_pb2, scheduler_pb2_grpc

_log = structlog.get_logger()
_now = time.monotonic

Call = grpc.aio.StreamStreamCall[scheduler_pb2.OpenRequest, scheduler_pb2.OpenResponse]


class Stubs(NamedTuple):
    """One scheduler's services, for unary calls."""

    scheduler: scheduler_pb2_grpc.SchedulerServiceStub
    admin: scheduler_pb2_grpc.AdminServiceStub
    health: health_pb2_grpc.HealthStub


class _ConnectionLostError(Exception):
    """Why this connection is over, for the log."""


class Connection:
    """Carries ``streams`` over one scheduler after the other. ``run`` is its only task."""

    def __init__(self, streams: Streams, settings: GatewaySettings) -> None:
        self._streams = streams
        self._settings = settings
        self._ready = asyncio.Event()
        self._is_closing = False
        self._stubs: Stubs | None = None
        self._lost_at: float | None = None
        self._last_heard = 0.0
        self._last_said = 0.0
        self._is_beat_due = False
        self._missed: set[str] = set()  # addresses, since we were connected

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where all of this runs."""
        return asyncio.get_running_loop()

    @cached_property
    def _wake(self) -> Bell:
        return Bell(self.loop)

    @property
    def is_ready(self) -> bool:
        """Whether a scheduler has welcomed us."""
        return self._ready.is_set()

    def wake(self) -> None:
        """There is something to write."""
        self._wake.set()

    async def stubs(self, timeout_s: float) -> Stubs:
        """Of the scheduler that we are connected to. Raises NO_CAPACITY if there is none in time.

        Calls that are under way when the connection is replaced are cancelled.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise unreachable() from None
        assert self._stubs is not None
        return self._stubs

    async def run(self) -> None:
        """Stay connected until cancelled."""
        settings = self._settings
        backoff_ms = settings.reconnect_backoff_min_ms
        turn = 0
        self._lost_at = _now()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._give_up_on_the_lost())
            while True:
                address = settings.scheduler_addresses[turn % len(settings.scheduler_addresses)]
                turn += 1
                was_ready = await self._converse(address)
                if was_ready:
                    backoff_ms = settings.reconnect_backoff_min_ms
                await asyncio.sleep(backoff_ms * random.uniform(0.5, 1.0) / 1000)  # noqa: S311
                if not was_ready:
                    backoff_ms = min(2 * backoff_ms, settings.reconnect_backoff_max_ms)

    async def _converse(self, address: str) -> bool:
        """One connection from hello to its end; gives whether the scheduler welcomed us."""
        channel = connect(address, max_message_bytes=self._settings.max_message_bytes)
        stubs = Stubs(
            scheduler_pb2_grpc.SchedulerServiceStub(channel),
            scheduler_pb2_grpc.AdminServiceStub(channel),
            health_pb2_grpc.HealthStub(channel),
        )
        was_ready = False
        cause = ""
        try:
            async with _opened(stubs.scheduler) as call:
                welcome = await self._greet(call)
                self._become_ready(stubs, address, welcome.epoch)
                was_ready = True
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._read(call))
                    group.create_task(self._write(call))
                    group.create_task(self._beat(_seconds(welcome.heartbeat_interval, 1.0)))
                    group.create_task(self._watch(_seconds(welcome.heartbeat_timeout, 5.0)))
        except* grpc.aio.AioRpcError as errors:
            first = errors.exceptions[0]
            assert isinstance(first, grpc.aio.AioRpcError)
            cause = f"{from_rpc_error(first).reason}: {first.code().name}, {first.details()}"
        except* (_ConnectionLostError, TimeoutError) as errors:
            cause = str(errors.exceptions[0]) or "timeout"
        except* (asyncio.InvalidStateError, grpc.aio.UsageError):
            cause = "ended while writing"
        finally:
            self._become_lost()
            await channel.close()
        if was_ready:
            _log.warning("scheduler.lost", address=address, cause=cause)
        else:
            # once is news; a standby refuses us as often as we come
            log = _log.debug if address in self._missed else _log.info
            log("scheduler.missed", address=address, cause=cause)
            self._missed.add(address)
        return was_ready

    def _become_ready(self, stubs: Stubs, address: str, epoch: int) -> None:
        self._stubs = stubs
        self._lost_at = None
        self._missed.clear()
        self._streams.connected()
        self._ready.set()
        self._wake.set()
        _log.info("scheduler.connected", address=address, epoch=epoch)

    def _become_lost(self) -> None:
        if self._ready.is_set():
            self._ready.clear()
            self._stubs = None
            self._lost_at = _now()
            self._streams.disconnected()

    async def _greet(self, call: Call) -> scheduler_pb2.ClientWelcome:
        """Hello and welcome; the timeout may cancel the stream, as nothing hangs on it yet."""
        async with asyncio.timeout(self._settings.connect_timeout_s):
            hello = scheduler_pb2.ClientHello(client_id=self._settings.client_id)
            await call.write(scheduler_pb2.OpenRequest(hello=hello))
            first = await call.read()
        if first is grpc.aio.EOF:
            raise _ConnectionLostError(await _ending(call))
        assert isinstance(first, scheduler_pb2.OpenResponse)
        if not first.HasField("welcome"):
            raise _ConnectionLostError("no welcome")
        return first.welcome

    async def _read(self, call: Call) -> None:
        self._last_heard = _now()
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                raise _ConnectionLostError(await _ending(call))
            assert isinstance(response, scheduler_pb2.OpenResponse)
            self._last_heard = _now()
            if response.HasField("updates"):
                is_elsewhere = apply_updates(self._streams, response.updates)
                if self._streams.has_commands:  # gaps and repeats make new ones
                    self._wake.set()
                if is_elsewhere:
                    raise _ConnectionLostError("not the leader")

    async def _write(self, call: Call) -> None:
        """Send what gathered while the last write was under way, else a heartbeat if it is due."""
        batch_bytes = self._settings.max_message_bytes // 4
        beat = scheduler_pb2.OpenRequest(heartbeat=scheduler_pb2.Heartbeat())
        while True:
            if self._streams.is_exhausted:
                raise _ConnectionLostError("out of handles")
            self._wake.clear()
            if self._streams.has_commands:
                commands = encode_commands(self._streams.take(batch_bytes))
                message = scheduler_pb2.OpenRequest(commands=commands)
            elif self._is_beat_due:
                message = beat
            else:
                await self._wake.wait()
                continue
            self._is_beat_due = False
            await call.write(message)
            self._last_said = _now()

    async def _beat(self, interval_s: float) -> None:
        """Have a heartbeat sent half an interval after the last message: the next look may come as
        late again."""
        self._last_said = _now()
        while True:
            await asyncio.sleep(interval_s / 2)
            if _now() - self._last_said >= interval_s / 2:
                self._is_beat_due = True
                self._wake.set()

    async def _watch(self, timeout_s: float) -> None:
        """A scheduler that says nothing for ``timeout_s`` is taken for dead."""
        while True:
            due = self._last_heard + timeout_s
            if due <= _now():
                raise _ConnectionLostError("silent")
            await asyncio.sleep(due - _now())
            if _now() - due > timeout_s / 2:  # it was us who stood still: much is yet to be read
                self._last_heard = _now()

    async def _give_up_on_the_lost(self) -> None:
        """End what has waited for a scheduler for too long, so that no client hangs."""
        limit_s = self._settings.reconnect_timeout_s
        while True:
            now = _now()
            lost_at = self._lost_at
            left_s = limit_s if lost_at is None else lost_at + limit_s - now
            if left_s <= 0:
                self._streams.fail_all(Failure(Reason.NO_CAPACITY, unreachable().message))
                left_s = limit_s
            await asyncio.sleep(left_s)


@contextlib.asynccontextmanager
async def _opened(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> AsyncIterator[Call]:
    call = stub.Open()
    try:
        yield call
    finally:
        call.cancel()


async def _ending(call: Call) -> str:
    return f"ended: {(await call.code()).name}"


def _seconds(duration: duration_pb2.Duration, default: float) -> float:
    return duration.ToMilliseconds() / 1000 or default
