"""uvicorn's HTTP/1.1 protocol, with the limits that it lacks, and our answers for its own errors.

Headers and trailers are bounded in bytes while they come in, and so is what stands around the
bytes of a body in chunks; headers must be there in time, and follow the rules of ``http_head``;
a connection that is neither idle in its keep-alive nor at work is on the same clock. Pipelining is
off, because a connection whose reading is paused by it cannot tell us that its client went away.
An offer to upgrade is taken out of the headers, for the parser would drop the body that comes with
it. A client that does not take the end of its answer is cut off. Whoever answers a request can have
itself told when its client goes away, which costs less than a task that waits for it.
"""

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway_http.head_writer import HeadWriter
from gateway_http.http_errors import error_response, invalid
from gateway_http.http_head import HeadRules
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason

# in a scope's state:
CONNECTION = "connection"  # the transport, see stall_guard.Connection
DEPARTURE = "departure"  # the Departure of its client
IS_WHOLE = "is_whole"  # whether all of its body is here
_FRAMING_PER_BODY_BYTE = 16  # chunks of one byte take five
_UPGRADE = re.compile(rb"(?i)\r\nupgrade:[^\r\n]*(?=\r\n[^ \t]|\Z)")


class Departure:
    """Tells one listener that the client of a request has gone away."""

    def __init__(self) -> None:
        self._listener: Callable[[], None] | None = None
        self._has_happened = False

    def listen(self, listener: Callable[[], None]) -> None:
        """Called once, now if it has happened."""
        if self._has_happened:
            listener()
        else:
            self._listener = listener

    def ignore(self) -> None:
        """It does not matter any more."""
        self._listener = None

    def happen(self) -> None:
        """The client has gone away."""
        self._has_happened = True
        if self._listener is not None:
            self._listener()
            self._listener = None


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections that overdo it; ``limits`` come before uvicorn's own arguments."""

    def __init__(
        self, limits: GatewaySettings, rules: HeadRules, /, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._rules = rules
        self._served_app = self.app
        self._refusal: HeadwayError | None = None
        self._departure = Departure()  # of the present request's client
        self._num_header_bytes = 0  # in the target and complete fields
        self._num_header_fields = 0
        self._num_read_bytes = 0  # since the headers or trailers began
        self._num_early_bytes = 0  # behind the head, if it ends in the piece that is being read
        self._num_spare_bytes = 0  # that may still come around the bytes of a body
        self._num_dropped_bytes = 0  # of a body that was answered before it was read
        self._is_in_headers = True  # or in trailers
        self._is_past_headers = False
        self._is_between_messages = True
        self._header_timer: asyncio.TimerHandle | None = None
        self._flush_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", HeadWriter(transport, self.loop)))
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_flush_timer()
        super().connection_lost(exc)
        self._departure.happen()

    def data_received(self, data: bytes) -> None:
        was_in_headers = self._is_in_headers
        if self._is_between_messages or not self._is_past_headers:
            head, end, rest = data.partition(b"\r\n\r\n")
            if end and self._is_between_messages:  # else the line may go on in the next read
                data = _UPGRADE.sub(b"", head) + end + rest
            self._num_early_bytes = len(rest) if end else len(data)
        else:
            self._num_early_bytes = 0
            self._num_spare_bytes -= len(data)  # on_body gives back more than what was body
        is_dropped = self.cycle is not None and self.cycle.response_complete
        if is_dropped and not self._is_between_messages:
            self._num_dropped_bytes += len(data)  # what stands around a body's bytes counts too
            if self._num_dropped_bytes > self._limits.max_body_bytes:
                self.transport.close()
        super().data_received(data)
        if was_in_headers and self._is_in_headers:
            self._num_read_bytes += len(data)
            self._check_size()
        if self._num_spare_bytes < 0:
            self.transport.close()
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._header_timer is None and not self.transport.is_closing():
            # The rest of a body that nobody reads, or empty lines: uvicorn's timer is off by now.
            self._start_header_timer()

    # --- what the parser finds

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # uvicorn would tell the newest request only
            self.cycle.message_event.set()
            self._departure.happen()
            self.transport.close()
        self._is_between_messages = False
        self._expect_headers()
        super().on_message_begin()
        # for whoever has to cut it: close() would wait for ever for a client that takes nothing
        self.scope["state"][CONNECTION] = self.transport
        self.scope["state"][DEPARTURE] = self._departure = Departure()
        self.scope["state"][IS_WHOLE] = self._is_whole

    def _is_whole(self) -> bool:
        return not self.cycle.more_body

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self._num_header_bytes += len(url)
        self._check_size()
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer; the latter is counted and dropped."""
        self._num_header_bytes += len(name) + len(value)
        self._num_header_fields += 1
        self._check_size()
        if not self._is_past_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_header_timer()
        self._is_in_headers = False
        self._is_past_headers = True
        self._num_spare_bytes = self._limits.max_header_bytes - self._num_early_bytes
        self._num_dropped_bytes = 0
        most = self._limits.max_connections
        if len(self.connections) > most or len(self.tasks) >= most:
            message = "This gateway has too many connections."
            self._refusal = HeadwayError(Reason.NO_CAPACITY, message)
        else:
            version = self.parser.get_http_version()
            self._refusal = self._rules.refusal(version, self.url, self.headers)
        self.app = self._served_app if self._refusal is None else self._refuse
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Before a chunk of a body, or before the trailers."""
        self._is_in_headers = True
        self._num_header_bytes = self._num_header_fields = self._num_read_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._is_in_headers = False
        self._num_spare_bytes += len(body) * (1 + _FRAMING_PER_BODY_BYTE)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_headers = False
        self._is_between_messages = True
        super().on_message_complete()
        # Nobody may wait for more of this body, and only a connection that is read can end.
        self.flow.resume_reading()

    # --- answers

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_flush_timer()
        self._expect_flush()

    def send_400_response(self, msg: str) -> None:
        """What the parser does not understand; there may be no request to go with it."""
        is_answering = self.cycle is not None and self.cycle.response_started
        if self.transport.is_closing() or (is_answering and not self.cycle.response_complete):
            self.transport.close()
            return
        path = self.scope.get("path", "") if self.scope is not None else ""
        response = error_response(invalid("This is not valid HTTP."), path, self._limits)
        lines = [b"HTTP/1.1 400 Bad Request", b"connection: close"]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()
        self._expect_flush()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Instead of the application: too many connections or requests, or a wrong head."""
        assert self._refusal is not None
        response = error_response(self._refusal, scope["path"], self._limits)
        response.headers["connection"] = "close"
        await response(scope, receive, send)

    # --- clocks

    def _check_size(self) -> None:
        num_bytes = max(self._num_header_bytes, self._num_read_bytes)
        limits = self._limits
        if num_bytes > limits.max_header_bytes or (
            self._num_header_fields > limits.max_header_fields
        ):
            self.transport.close()

    def _expect_headers(self) -> None:
        self._is_in_headers = True
        self._is_past_headers = False
        self._num_header_bytes = self._num_header_fields = self._num_read_bytes = 0
        self._stop_header_timer()
        self._start_header_timer()

    def _start_header_timer(self) -> None:
        timeout_s = self._limits.header_timeout_s
        self._header_timer = self.loop.call_later(timeout_s, self.transport.close)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_flush_timer(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None

    def _expect_flush(self, num_before: int | None = None) -> None:
        """Look now and then whether the client takes what it was answered."""
        num_left = self.transport.get_write_buffer_size()
        if num_left and (num_before is None or num_left < num_before):
            wait_s = self._limits.stream_write_timeout_s
            self._flush_timer = self.loop.call_later(wait_s, self._expect_flush, num_left)
        elif num_left:
            self.transport.abort()


def bounded_protocol(limits: GatewaySettings) -> Any:
    """What uvicorn's Config wants for ``http``: called like a protocol class."""
    return partial(BoundedProtocol, limits, HeadRules(limits))
