"""The scheduler process: ``headway-scheduler`` or ``python -m scheduler_svc``."""

import asyncio
import signal
import sys

import structlog
import uvloop

from headway import logs
from scheduler_svc.process import make_store, started
from scheduler_svc.settings import SchedulerSettings

_log = structlog.get_logger()


async def _serve(settings: SchedulerSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if not settings.is_loopback:
        _log.warning("server.exposed", host=settings.host, message="no TLS, no authentication")
    async with started(settings, make_store(settings)) as process:
        _log.info("server.started", host=settings.host, port=process.port)
        await stop.wait()
        await process.drain()
    _log.info("server.stopped")


def main() -> None:
    """Read the settings and serve until SIGTERM or SIGINT."""
    settings = SchedulerSettings.load("headway-scheduler")
    logs.configure("scheduler", settings.log_level)
    try:
        uvloop.run(_serve(settings))
    except OSError as error:
        sys.exit(f"headway-scheduler: {error}")


if __name__ == "__main__":
    main()
