"""A scheduler without gRPC: peers are queues, so that a test decides who reads and who does not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from headway.v1 import fleet_pb2 as fleet
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.catalog import Catalog
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.fleet import FleetService
from scheduler_svc.process import make_store
from scheduler_svc.runtime import Runtime
from scheduler_svc.service import SchedulerService
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.streams import Pulse
from tests.scheduler.world import CARD, body


class FakeContext:
    """What a handler needs of its call."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Any], None]] = []

    async def send_initial_metadata(self, metadata: object) -> None:
        pass

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def end(self) -> None:
        """The call is over."""
        for callback in self._callbacks:
            callback(self)


class Wire:
    """The peer's end of one stream. A response is written while the next one is not asked for."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        self.context = FakeContext()
        self.num_taken = 0
        self._sent: asyncio.Queue[Any] = asyncio.Queue()
        self._responses = handler(self._requests(), self.context)

    async def _requests(self) -> AsyncIterator[Any]:
        while (message := await self._sent.get()) is not None:
            self.num_taken += 1
            yield message

    def send(self, message: Any) -> None:
        """Never waits; ``num_taken`` says what was read."""
        self._sent.put_nowait(message)

    async def read(self) -> Any:
        """The next response. Raises HeadwayError, or StopAsyncIteration."""
        async with asyncio.timeout(60):
            while True:
                message = await anext(self._responses)
                if not message.HasField("heartbeat"):
                    return message


async def turn(times: int = 20) -> None:
    """Let every task go on as far as it can."""
    for _ in range(times):
        await asyncio.sleep(0)


class Inside:
    """The parts of a scheduler process, wired as in process.py."""

    def __init__(self, **settings: Any) -> None:
        self.settings = SchedulerSettings(**settings)
        self.now_ms = 0
        self.catalog = Catalog(self.settings, self.clock_ms)
        self.now_ms = 1_000
        core = Scheduler(self.settings.core(), 1)
        self.runtime = Runtime(
            core, make_store(self.settings), self.settings, epoch=1, clock_ms=self.clock_ms
        )
        self.pulse = Pulse(self.settings, self.clock_ms)
        self.service = SchedulerService(self.runtime, self.catalog, self.pulse)
        self.fleet = FleetService(self.runtime, self.catalog, self.pulse)

    def clock_ms(self) -> int:
        return self.now_ms

    async def client(self) -> Wire:
        """A client that was welcomed."""
        wire = Wire(self.service.Open)
        wire.send(scheduler.OpenRequest(hello=scheduler.ClientHello(client_id="c")))
        assert (await wire.read()).HasField("welcome")
        return wire

    async def executor(self, executor_id: str = "e1", *, num_slots: int = 4) -> Wire:
        """An executor that was welcomed."""
        wire = Wire(self.fleet.Attach)
        hello = fleet.ExecutorHello(
            executor_id=executor_id,
            incarnation="1",
            capacity=fleet.Capacity(num_slots=num_slots, max_models=1),
            models=[fleet.ModelOffer(card=CARD, resident=True)],
        )
        wire.send(fleet.AttachRequest(hello=hello))
        assert (await wire.read()).HasField("welcome")
        return wire

    def cut_silent(self, after_ms: int) -> None:
        """Time passes, and the pulse is felt."""
        self.now_ms += after_ms
        for stream in list(self.pulse.streams):
            stream.check_pulse(self.now_ms)


def submits(*handles: int, **fields: Any) -> scheduler.OpenRequest:
    request = fields.pop("request", body())
    commands = [
        scheduler.SubmitCommand(handle=handle, request=request, **fields) for handle in handles
    ]
    return scheduler.OpenRequest(commands=scheduler.ClientCommands(submits=commands))


@contextlib.asynccontextmanager
async def inside(**settings: Any) -> AsyncIterator[Inside]:
    """With its runtime running."""
    own = Inside(**settings)
    task = asyncio.create_task(own.runtime.run())
    try:
        yield own
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
