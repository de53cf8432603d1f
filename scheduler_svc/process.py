"""The scheduler process put together: what ``__main__`` runs and tests start on a free port."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from headway.collector import Collector
from headway.server import Server
from headway.v1 import fleet_pb2, fleet_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from scheduler_svc.admin import AdminService
from scheduler_svc.catalog import Catalog
from scheduler_svc.core import messages
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.fleet import FleetService
from scheduler_svc.runtime import Runtime, monotonic_ms
from scheduler_svc.service import SchedulerService
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.store.base import Store
from scheduler_svc.store.memory import MemoryStore
from scheduler_svc.streams import Pulse

_log = structlog.get_logger()


class Process:
    """A started scheduler. ``port`` is the real one."""

    def __init__(
        self, settings: SchedulerSettings, server: Server, runtime: Runtime, port: int
    ) -> None:
        self.port = port
        self.runtime = runtime
        self._settings = settings
        self._server = server

    async def drain(self) -> None:
        """Refuse what is new, finish what was accepted, up to the drain timeout."""
        _log.info("drain.started")
        await self._server.set_serving(False)
        self.runtime.post(messages.CloseDoor())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_ms / 1_000):
                await self.runtime.idle()


def make_store(settings: SchedulerSettings) -> Store:
    """The store that the settings ask for."""
    return MemoryStore(
        result_ttl_ms=settings.result_ttl_ms,
        max_result_bytes=settings.max_result_bytes,
        max_tombstones=settings.max_tombstones,
    )


@contextlib.asynccontextmanager
async def _opened(store: Store) -> AsyncIterator[int]:
    """Gives the epoch; closed again however far the start came."""
    epoch = await store.open()
    try:
        yield epoch
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def started(settings: SchedulerSettings, store: Store) -> AsyncIterator[Process]:
    """Serve until the context ends; a task that dies ends it with an exception group.

    Raises OSError if the address is taken.
    """
    async with _opened(store) as epoch:
        core = Scheduler(settings.core(), epoch)
        runtime = Runtime(core, store, settings, epoch=epoch)
        catalog = Catalog(settings, monotonic_ms)
        pulse = Pulse(settings, monotonic_ms)
        service = SchedulerService(runtime, catalog, pulse)
        server = Server(
            max_message_bytes=settings.max_message_bytes,
            max_concurrent_streams=settings.max_concurrent_streams,
            has_reflection=settings.has_reflection,
        )
        for descriptor, add, servicer in (
            (
                scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"],
                scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server,
                service,
            ),
            (
                scheduler_pb2.DESCRIPTOR.services_by_name["AdminService"],
                scheduler_pb2_grpc.add_AdminServiceServicer_to_server,
                AdminService(runtime, settings),
            ),
            (
                fleet_pb2.DESCRIPTOR.services_by_name["FleetService"],
                fleet_pb2_grpc.add_FleetServiceServicer_to_server,
                FleetService(runtime, catalog, pulse),
            ),
        ):
            server.register(descriptor, add, servicer)
        port = await server.start(settings.address)
        collector = Collector(settings, lambda: core.num_waiting + core.num_running, monotonic_ms)
        async with asyncio.TaskGroup() as tasks:
            own = [tasks.create_task(task.run()) for task in (runtime, pulse, service, collector)]
            try:
                yield Process(settings, server, runtime, port)
            finally:
                await server.stop(settings.stop_grace_ms / 1_000)
                for task in own:
                    task.cancel()
