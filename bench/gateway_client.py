"""A load client for chats that costs little: one protocol object a connection, nothing parsed
beyond the HTTP, no event kept. It checks that every answer is whole."""

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

# an opening chunk has an empty content
_HAS_TEXT = re.compile(rb'"content": ?"[^"]')
_DONE = b"data: [DONE]"


def chat(url: str, model: str, num_tokens: int, *, is_streaming: bool) -> bytes:
    """A whole HTTP request."""
    host = urlsplit(url).netloc
    message = {"role": "user", "content": "Say a few words, please, about anything you like."}
    body = {"model": model, "messages": [message], "max_tokens": num_tokens}
    data = json.dumps({**body, "stream": is_streaming}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\n"
        f"content-type: application/json\r\nauthorization: Bearer none\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


@dataclass(slots=True)
class Answer:
    """What is remembered of one: its status, when its first text came, its last bytes."""

    asked_at: float
    status: int = 0
    first_text_s: float | None = None  # since it was asked for
    tail: bytes = b""

    def check(self, *, is_streaming: bool) -> None:
        assert self.status == 200, (self.status, self.tail)
        is_whole = _DONE in self.tail if is_streaming else b"}" in self.tail
        assert is_whole, self.tail
        assert self.first_text_s is not None, "an answer without text"


class Connection(asyncio.Protocol):
    """Asks one thing after the other."""

    def __init__(self) -> None:
        self._answer: Answer
        self._done: asyncio.Future[Answer]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    async def ask(self, request: bytes) -> Answer:
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._answer = Answer(time.perf_counter())
        self._transport.write(request)
        return await self._done

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        answer = self._answer
        if answer.first_text_s is None and _HAS_TEXT.search(data):
            answer.first_text_s = time.perf_counter() - answer.asked_at
        answer.tail = (answer.tail + data)[-64:]

    def on_message_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        if not self._done.done():
            self._done.set_result(self._answer)

    def connection_lost(self, error: Exception | None) -> None:
        if hasattr(self, "_done") and not self._done.done():
            self._done.set_exception(error or ConnectionResetError("in the middle of an answer"))

    def close(self) -> None:
        self._transport.abort()


async def connect(url: str) -> Connection:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, parts.hostname, parts.port)
    return connection


@dataclass(slots=True)
class Load:
    """What came of a phase."""

    num_answers: int = 0
    first_text_s: list[float] = field(default_factory=list)


async def run_load(
    url: str, model: str, *, clients: int, num_tokens: int, is_streaming: bool, seconds: float
) -> Load:
    """So many clients at once, each asking again when it has its answer.

    Those that are under way at the end are waited for, and count.
    """
    request = chat(url, model, num_tokens, is_streaming=is_streaming)
    deadline = time.perf_counter() + seconds
    load = Load()

    async def keep_asking() -> None:
        connection = await connect(url)
        try:
            while time.perf_counter() < deadline:
                answer = await connection.ask(request)
                answer.check(is_streaming=is_streaming)
                load.num_answers += 1
                assert answer.first_text_s is not None
                load.first_text_s.append(answer.first_text_s)
        finally:
            connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(keep_asking())
    return load
