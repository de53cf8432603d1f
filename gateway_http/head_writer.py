"""A transport that writes the head of an answer together with the bytes that follow it.

uvicorn writes them one after the other, uvloop writes at once, and TCP_NODELAY makes each a packet
of its own: two system calls here and two wake-ups at the client for each answer.
"""

import asyncio
from typing import Any

_HEAD = b"HTTP/1."


class HeadWriter:
    """What it does not do itself, its transport does."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """A head waits for the next write, but no longer than this turn of the event loop."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        """Once everything is written."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Now; what waits is lost."""
        self._head = b""
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Bytes that are not written yet."""
        return self._transport.get_write_buffer_size() + len(self._head)

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self._transport.is_closing():
            self._transport.write(head)
