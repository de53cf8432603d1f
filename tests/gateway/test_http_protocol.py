"""HTTP as bytes: what uvicorn would get wrong, answer in plain text, or wait for without an end."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.server import ServerState

from gateway_http import __main__ as gateway_main
from gateway_http.client import SchedulerClient
from gateway_http.http_head import HeadRules
from gateway_http.http_protocol import BoundedProtocol
from gateway_http.middleware import ErrorTranslator
from gateway_http.settings import GatewaySettings
from tests.gateway.conftest import serving, settings_for
from tests.gateway.scripted import ScriptedScheduler

WAIT_S = 60.0
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, port)
    try:
        async with asyncio.timeout(WAIT_S):
            yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer with a Content-Length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, body


async def echo(request: Request) -> Response:
    """The body, and whatever stands in the scope as a header."""
    body = await request.body()
    return Response(body, headers={"x-num-fields": str(len(request.scope["headers"]))})


async def large(request: Request) -> Response:
    return Response(b"x" * (32 << 20))


def ignore(*_: object) -> None:
    """Counts nothing."""


@pytest.fixture
def small_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the gateway's routes: nothing but the protocol is under test."""

    def build(client: SchedulerClient, settings: GatewaySettings) -> Starlette:
        app = Starlette(middleware=[Middleware(ErrorTranslator, settings, ignore, ignore)])
        app.add_route("/echo", echo, methods=["POST"])
        app.add_route("/early", lambda request: Response(b"no"), methods=["POST"])
        app.add_route("/large", large, methods=["GET"])
        return app

    monkeypatch.setattr(gateway_main, "build_app", build)


async def closes(reader: asyncio.StreamReader) -> bool:
    """Whether the server ends the connection soon."""
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "text", [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"]
)
async def test_what_is_not_http_is_answered_in_json(base_url: str, text: bytes) -> None:
    async with connected(base_url) as (reader, writer):
        writer.write(text)
        status, headers, body = await read_answer(reader)
        assert status == 400
        assert headers["content-type"] == "application/json"
        assert headers["x-should-retry"] == "false"
        assert headers["connection"] == "close"
        assert json.loads(body)["code"] == "INVALID_REQUEST"
        assert await closes(reader)


async def test_garbage_in_a_body_ends_the_connection_without_a_second_answer(
    client: SchedulerClient, settings: GatewaySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun = asyncio.Event()

    async def drip(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"some", "more_body": True})  # type: ignore[operator]
        has_begun.set()
        await receive()  # type: ignore[operator]

    monkeypatch.setattr(gateway_main, "build_app", lambda client, settings: drip)
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        writer.write(CHUNKED)
        await has_begun.wait()
        writer.write(b"no chunk\r\n")
        answer = await reader.read()
    assert answer.count(b"HTTP/1.1") == 1


async def test_one_connection_too_many_is_told_when_to_come_back(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    settings = settings_for(scheduler, max_connections=1)
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        writer.write(GET)
        assert (await read_answer(reader))[0] == 200
        async with connected(url) as (other_reader, other_writer):
            other_writer.write(GET.replace(b"/health", b"/v1/models"))
            status, headers, body = await read_answer(other_reader)
            assert status == 503
            assert headers["x-should-retry"] == "true"
            assert int(headers["retry-after"]) >= 1
            assert json.loads(body)["error"]["code"] == "no_capacity"
            assert await closes(other_reader)
        writer.write(GET)
        assert (await read_answer(reader))[0] == 200


@pytest.mark.usefixtures("small_app")
async def test_trailers_are_dropped_and_bounded(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    settings = settings_for(scheduler, max_header_bytes=2_000)
    async with serving(client, settings) as url:
        async with connected(url) as (reader, writer):
            writer.write(CHUNKED + b"3\r\nabc\r\n0\r\nX-One: 1\r\nX-Two: 2\r\n\r\n")
            status, headers, body = await read_answer(reader)
            assert (status, body, headers["x-num-fields"]) == (200, b"abc", "2")
            writer.write(CHUNKED + b"5\r\n" + b"x" * 5 + b"\r\n0\r\n\r\n")
            assert (await read_answer(reader))[2] == b"x" * 5
        for trailer in (b"X-Many: 1\r\n" * 400, b"X-Long: " + b"x" * 4_000):
            async with connected(url) as (reader, writer):
                writer.write(CHUNKED + b"3\r\nabc\r\n0\r\n")
                await writer.drain()
                writer.write(trailer)
                assert await closes(reader)


@pytest.mark.usefixtures("small_app")
async def test_many_chunks_are_no_long_headers(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    settings = settings_for(scheduler, max_header_bytes=500)
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        writer.write(CHUNKED)
        for _ in range(1_000):
            writer.write(b"1\r\nx\r\n")
        await writer.drain()
        writer.write(b"0\r\n\r\n")
        assert (await read_answer(reader))[2] == b"x" * 1_000


async def test_long_headers_are_refused_also_if_they_come_at_once(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    settings = settings_for(scheduler, max_header_bytes=500)
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 200 + b"\r\n")
        assert await closes(reader)


@pytest.mark.usefixtures("small_app")
@pytest.mark.parametrize(
    ("request_head", "rest"),
    [
        (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", b"\r\n"),
        (b"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n", b"some"),
    ],
)
async def test_a_connection_is_always_on_some_clock(
    client: SchedulerClient, scheduler: ScriptedScheduler, request_head: bytes, rest: bytes
) -> None:
    settings = settings_for(scheduler, header_timeout_s=1)
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        writer.write(request_head)
        assert (await read_answer(reader))[0] == 200
        writer.write(rest)  # ends the keep-alive timer, and begins no request
        assert await closes(reader)


@pytest.mark.usefixtures("small_app")
@pytest.mark.parametrize("connection", [b"keep-alive", b"close"])
async def test_a_client_that_does_not_take_its_answer_is_cut_off(
    client: SchedulerClient,
    scheduler: ScriptedScheduler,
    monkeypatch: pytest.MonkeyPatch,
    connection: bytes,
) -> None:
    is_lost = asyncio.Event()
    lose = BoundedProtocol.connection_lost

    def lost(self: BoundedProtocol, exc: Exception | None) -> None:
        lose(self, exc)
        is_lost.set()

    monkeypatch.setattr(BoundedProtocol, "connection_lost", lost)
    settings = settings_for(scheduler, stream_write_timeout_s=0.1)
    async with serving(client, settings) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as peer:
            head = b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: "
            peer.sendall(head + connection + b"\r\n\r\n")
            await asyncio.wait_for(is_lost.wait(), WAIT_S)  # nothing is read from the peer


class SlowTransport:
    """Its buffer has the given sizes, one look after the other."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = list(sizes)
        self.looked = asyncio.Event()
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        size = self.sizes.pop(0)
        if not self.sizes:
            self.looked.set()
        return size

    def abort(self) -> None:
        self.is_aborted = True


@pytest.mark.parametrize(("sizes", "is_aborted"), [((9, 8, 1, 0), False), ((9, 8, 8), True)])
async def test_a_slow_reader_is_left_alone_while_it_reads(
    client: SchedulerClient, sizes: tuple[int, ...], is_aborted: bool
) -> None:
    settings = GatewaySettings(stream_write_timeout_s=0.001)
    config = gateway_main.Server(client, settings).config
    protocol = BoundedProtocol(settings, HeadRules(settings), config, ServerState(), {})
    transport = SlowTransport(*sizes)
    protocol.transport = transport  # type: ignore[assignment]
    protocol._expect_flush()
    await asyncio.wait_for(transport.looked.wait(), WAIT_S)
    assert transport.is_aborted == is_aborted


@pytest.mark.usefixtures("small_app")
async def test_an_offer_to_upgrade_is_ignored(
    client: SchedulerClient, settings: GatewaySettings
) -> None:
    body = b"\r\nUpgrade: body\r\n\r\n"
    head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % len(body)
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        for headers in (offer, b"", offer.lower()):
            writer.write(head + headers + b"\r\n" + body)
            status, _, echoed = await read_answer(reader)
            assert (status, echoed) == (200, body)


@pytest.mark.usefixtures("small_app")
@pytest.mark.parametrize("piece_bytes", [50, 1_000_000])
@pytest.mark.parametrize(
    "framing", [b"1;" + b"x" * 5_000, (b"1;" + b"x" * 100 + b"\r\nx\r\n") * 100]
)
async def test_framing_may_not_outweigh_what_it_frames(
    client: SchedulerClient, scheduler: ScriptedScheduler, framing: bytes, piece_bytes: int
) -> None:
    settings = settings_for(scheduler, max_header_bytes=1_000)
    whole = CHUNKED + b"1\r\nx\r\n" + framing
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        for start in range(0, len(whole), piece_bytes):
            writer.write(whole[start : start + piece_bytes])
        assert await closes(reader)


@pytest.mark.usefixtures("small_app")
async def test_the_rest_of_a_body_that_was_answered_is_taken_but_not_for_ever(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    settings = settings_for(scheduler, max_body_bytes=1 << 20)
    head = b"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        writer.write(head)
        assert (await read_answer(reader))[0] == 200
        writer.write(b"x" * 500_000)
        await writer.drain()
        assert not reader.at_eof()
        writer.write(b"x" * 1_500_000)
        assert await closes(reader)


@pytest.mark.usefixtures("small_app")
async def test_the_rest_of_a_body_and_the_next_request_may_come_in_one_piece(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    settings = settings_for(scheduler, max_header_bytes=500)
    head = b"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000\r\n\r\n"
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        writer.write(head)
        for _ in range(5):
            assert (await read_answer(reader))[0] == 200
            writer.write(b"x" * 50_000 + head)
        assert (await read_answer(reader))[0] == 200


@pytest.mark.parametrize(
    ("changes", "host", "status"),
    [
        ({}, "localhost:80", 200),
        ({}, "[::1]", 200),
        ({}, "rebound.example", 403),
        ({"allowed_hosts": "gate.example,other"}, "GATE.example.:8080", 200),
        ({"allowed_hosts": "gate.example,other"}, "localhost", 403),
        ({"allowed_hosts": "*"}, "rebound.example", 200),
        ({"allow_insecure": True}, "gateway", 200),
        ({"api_keys": "t=key", "signing_key": "0123456789abcdef"}, "gate.example", 200),
    ],
)
async def test_hosts_that_are_answered(
    client: SchedulerClient,
    scheduler: ScriptedScheduler,
    changes: dict[str, object],
    host: str,
    status: int,
) -> None:
    settings = settings_for(scheduler, **changes)
    async with serving(client, settings) as url, connected(url) as (reader, writer):
        writer.write(GET.replace(b"localhost", host.encode()))
        found, _, body = await read_answer(reader)
        assert found == status
        assert (status == 200) or json.loads(body)["code"] == "PERMISSION_DENIED"
