"""A gRPC server and a gRPC channel, set up the same way in every process.

The numbers behind the options are explained in docs/adr/0003-grpc-aio.md; the short form: HTTP/2
pings find dead links, heartbeats on the streams find hung event loops.
"""

from collections.abc import Sequence
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headway.errors import ErrorInterceptor

_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Without it the core waits 60 s for the ping's answer, whatever keepalive_timeout says.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class Server:
    """A grpc.aio server with error translation, health and, if wanted, reflection."""

    def __init__(
        self,
        *,
        max_message_bytes: int,
        max_concurrent_streams: int,
        has_reflection: bool,
    ) -> None:
        self._has_reflection = has_reflection
        self._names: list[str] = [health.SERVICE_NAME]
        self.grpc_server = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=[
                *_KEEPALIVE,
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_concurrent_streams", max_concurrent_streams),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)

    def register(self, descriptor: Any, add_to_server: Any, servicer: object) -> None:
        """Add a service; ``descriptor`` is its entry in the generated DESCRIPTOR."""
        add_to_server(servicer, self.grpc_server)
        self._names.append(descriptor.full_name)

    async def start(self, address: str) -> int:
        """Bind and serve; gives the port. Raises OSError if the address is taken."""
        if self._has_reflection:
            reflection.enable_server_reflection(
                [*self._names, reflection.SERVICE_NAME], self.grpc_server
            )
        try:
            port = self.grpc_server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}") from error
        await self.grpc_server.start()
        await self.set_serving(True)
        return port

    async def set_serving(self, is_serving: bool) -> None:
        """Tell health checkers whether to send work here."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Give running calls ``grace_s`` to end, then cut them."""
        await self.grpc_server.stop(grace_s)


def connect(address: str, *, max_message_bytes: int) -> grpc.aio.Channel:
    """A channel that notices dead links in seconds and reconnects without long pauses."""
    options: Sequence[tuple[str, int]] = (
        *_KEEPALIVE,
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.enable_http_proxy", 0),
    )
    return grpc.aio.insecure_channel(address, options=options)
