"""uvicorn's HTTP/1.1 protocol, with the limits on headers that it lacks.

Headers are bounded in bytes while they come in and must be there in time; pipelining is off,
because a connection whose reading is paused by it cannot tell us that its client went away.
"""

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway_http.settings import GatewaySettings

ABORT = "abort"  # in a scope's state: cuts the connection at once


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections that overdo it; ``limits`` come before uvicorn's own arguments."""

    def __init__(self, limits: GatewaySettings, /, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._num_header_bytes = 0
        self._is_in_headers = True
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_headers:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > self._limits.max_header_bytes:
                self.transport.close()

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # uvicorn would tell the newest request only
            self.cycle.message_event.set()
            self.transport.close()
        self._expect_headers()
        super().on_message_begin()
        # close() would wait for ever for a client that takes nothing
        self.scope["state"][ABORT] = self.transport.abort

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._is_in_headers = False
        super().on_headers_complete()

    def _expect_headers(self) -> None:
        self._stop_timer()
        self._is_in_headers = True
        self._num_header_bytes = 0
        timeout_s = self._limits.header_timeout_s
        self._header_timer = self.loop.call_later(timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def bounded_protocol(limits: GatewaySettings) -> Any:
    """What uvicorn's Config wants for ``http``: called like a protocol class."""
    return partial(BoundedProtocol, limits)
