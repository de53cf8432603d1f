"""Heads of answers leave with what follows them, and never wait beyond a turn."""

import asyncio
from typing import cast

from gateway_http.head_writer import HeadWriter

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Written:
    """A transport that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[bytes | str] = []
        self.is_lost = False

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def close(self) -> None:
        self.calls.append("close")

    def abort(self) -> None:
        self.calls.append("abort")

    def is_closing(self) -> bool:
        return self.is_lost

    def get_write_buffer_size(self) -> int:
        return 0


def made(*, is_lost: bool = False) -> tuple[HeadWriter, list[bytes | str]]:
    written = Written()
    written.is_lost = is_lost
    transport = cast("asyncio.Transport", written)
    return HeadWriter(transport, asyncio.get_running_loop()), written.calls


async def test_a_head_leaves_with_its_body_and_later_bytes_at_once() -> None:
    writer, calls = made()
    writer.write(HEAD)
    assert calls == []
    assert writer.get_write_buffer_size() == len(HEAD)
    writer.write(b"{")
    writer.write(b"}")
    assert calls == [HEAD + b"{", b"}"]
    await asyncio.sleep(0)
    writer.write(HEAD)
    writer.write(b"{}")
    assert calls[2:] == [HEAD + b"{}"]


async def test_a_head_whose_body_is_late_goes_ahead() -> None:
    writer, calls = made()
    writer.write(HEAD)
    await asyncio.sleep(0)
    assert calls == [HEAD]
    writer.write(b"{}")
    assert calls == [HEAD, b"{}"]


async def test_closing_writes_a_head_first_and_aborting_drops_it() -> None:
    writer, calls = made()
    writer.write(HEAD)
    writer.close()
    assert calls == [HEAD, "close"]
    writer, calls = made()
    writer.write(HEAD)
    writer.abort()
    await asyncio.sleep(0)
    assert calls == ["abort"]


async def test_a_head_for_a_lost_connection_is_dropped() -> None:
    writer, calls = made(is_lost=True)
    writer.write(HEAD)
    await asyncio.sleep(0)
    assert calls == []
