"""Puts the gateway together and runs it."""

import asyncio
import contextlib
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator

import structlog
import uvicorn
import uvloop

from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from gateway_http.http_protocol import bounded_protocol
from gateway_http.settings import GatewaySettings
from headway import logs
from headway.collector import Collector
from headway.settings import is_loopback

BACKLOG = 2_048
_log = structlog.get_logger()


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM lets running requests end, and then ends them itself."""

    def __init__(self, client: SchedulerClient, settings: GatewaySettings) -> None:
        self._client = client
        self._grace_s = settings.shutdown_grace_s
        super().__init__(
            uvicorn.Config(
                build_app(client, settings),
                http=bounded_protocol(settings),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # warnings tell of broken clients, one line for each request
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=settings.keep_alive_s,
                # a little more than the grace, for the last events to get out
                timeout_graceful_shutdown=int(settings.shutdown_grace_s) + 2,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end serving, and are not raised again afterwards."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new; what runs has the grace to end, and is told DRAINING after it."""
        _log.info("server.draining", num_inflight=self._client.num_inflight)
        self._client.drain()
        timer = asyncio.get_running_loop().call_later(self._grace_s, self._client.fail_all)
        await super().shutdown(sockets)
        timer.cancel()


async def serve(settings: GatewaySettings) -> None:
    """Run until SIGTERM or SIGINT."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server(
        (settings.host, settings.port),
        family=family,
        backlog=BACKLOG,
        reuse_port=settings.reuse_port,
    )
    # Inherited by connections: else the kernel takes megabytes for a client that reads nothing.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, settings.max_unsent_bytes)
    client = SchedulerClient(settings)
    collector = Collector(settings, lambda: client.num_inflight, _monotonic_ms)
    async with client.running(), asyncio.TaskGroup() as tasks:
        collecting = tasks.create_task(collector.run())
        host, port = listener.getsockname()[:2]
        if not (settings.has_keys or is_loopback(settings.host)):
            _log.warning("server.unprotected", host=host, port=port)
        _log.info("server.started", host=host, port=port)
        await Server(client, settings).serve(sockets=[listener])
        collecting.cancel()
    _log.info("server.stopped")


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _raise_file_limit() -> None:
    """Every waiting SDK call holds a socket of its own: take all that we may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """The command headway-gateway."""
    settings = GatewaySettings.load("headway-gateway")
    logs.configure("gateway", settings.log_level)
    _raise_file_limit()
    try:
        uvloop.run(serve(settings))
    except OSError as error:
        sys.exit(f"headway-gateway: cannot listen on {settings.host}:{settings.port}: {error}")


if __name__ == "__main__":
    main()
