"""Readers that stop: bounded in memory, cut off, let back in; nobody else notices."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import psutil

from bench.stack import Stack
from executor_svc.mock_engine import MockConfig
from executor_svc.mock_formulas import mock_tokens

NUM_STOPPED = 8
NUM_TOKENS = 20_000
SEED = 1
RECEIVE_BYTES = 4_096  # of a socket: whoever does not read is soon in arrears
EXECUTOR = {"max_num_seqs": 2 * NUM_STOPPED, "mock_step_ms": 2, "mock_tokens_per_step": 10}
SCHEDULER = {"resume_grace_ms": 600_000}
NUM_TOP = 20
MAX_UNREAD = 10_000
BYTES_EACH = 4 << 20  # MAX_UNREAD at 64 bytes, their text, and buffers; all tokens would be 27 MB


def body(number: int, **changes: object) -> dict[str, Any]:
    sampling = {"max_tokens": NUM_TOKENS, "seed": SEED, "ignore_eos": True}
    prompt = {"model": "mock", "prompt": [number, 2, 3]}
    return {**prompt, **sampling, "stream": True, "return_token_ids": True, **changes}


def expected(number: int) -> list[int]:
    return mock_tokens(
        [number, 2, 3],
        seed=SEED,
        sample=0,
        start=0,
        stop=NUM_TOKENS,
        vocab_size=MockConfig().vocab_size,
    )


@contextlib.contextmanager
def stopped_readers(stack: Stack, **changes: object) -> Iterator[list[socket.socket]]:
    """Clients that ask for a stream under a key of their own, and read nothing of it."""
    host, port = stack.gateway_url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as readers:
        plugs = []
        for number in range(NUM_STOPPED):
            data = json.dumps(body(number, **changes)).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nIdempotency-Key: {number}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            )
            plug = readers.enter_context(socket.socket())
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            plug.connect((host, int(port)))
            plug.sendall(head.encode() + data)
            plugs.append(plug)
        yield plugs


def wait_for_cuts(stack: Stack) -> list[dict[str, Any]]:
    """What the gateway says about each reader that it has cut off."""

    def cuts() -> list[dict[str, Any]]:
        return [line for line in stack.gateway.lines if line["event"] == "stream.cut"]

    stack.gateway.wait_for("stream.cut", lambda _: len(cuts()) >= NUM_STOPPED)
    return cuts()


async def read_all(stack: Stack, number: int) -> list[int]:
    """A reader that takes everything at once."""
    async with (
        httpx.AsyncClient(base_url=stack.gateway_url, timeout=60) as http,
        http.stream("POST", "/v1/completions", json=body(number)) as response,
    ):
        return token_ids([line async for line in response.aiter_lines()])


def token_ids(lines: Iterable[str]) -> list[int]:
    datas = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    choices = [choice for data in datas for choice in json.loads(data)["choices"]]
    return [token_id for choice in choices for token_id in choice["token_ids"]]


def what_arrived(plug: socket.socket) -> tuple[str, list[str]]:
    """What the kernel had of a stream that was cut: its head, and whole events only."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := plug.recv(1 << 16):
            parts.append(part)
    head, _, rest = b"".join(parts).decode().partition("\r\n\r\n")
    events = rest.split("\n\n")[:-1]
    return head, ["\n".join(line for line in one.splitlines() if ": " in line) for one in events]


async def test_a_reader_that_falls_behind_takes_no_more_room() -> None:
    gateway = {"max_unread_tokens": MAX_UNREAD, "stream_write_timeout_s": 3_600}
    with Stack.start(executor=EXECUTOR, gateway=gateway) as stack:
        assert await read_all(stack, NUM_STOPPED) == expected(NUM_STOPPED)  # all code is loaded
        process = psutil.Process(stack.gateway.pid)
        before = process.memory_info().rss
        with stopped_readers(stack, logprobs=NUM_TOP):
            cuts = await asyncio.to_thread(wait_for_cuts, stack)
            grown = process.memory_info().rss - before
    assert {(cut["cause"], cut["is_resumable"]) for cut in cuts} == {("behind", True)}
    assert grown < NUM_STOPPED * BYTES_EACH, f"the gateway grew by {grown >> 20} MiB"


async def test_a_reader_that_takes_nothing_is_cut_and_may_come_back() -> None:
    gateway = {"stream_write_timeout_s": 6}
    with (
        Stack.start(scheduler=SCHEDULER, executor=EXECUTOR, gateway=gateway) as stack,
        stopped_readers(stack) as plugs,
    ):
        reading = [read_all(stack, number) for number in range(NUM_STOPPED)]
        for number, tokens in enumerate(await asyncio.gather(*reading)):
            assert tokens == expected(number), "who reads has everything, whoever else does not"
        cuts = await asyncio.to_thread(wait_for_cuts, stack)
        assert {(cut["cause"], cut["is_resumable"]) for cut in cuts} == {("stalled", True)}
        async with httpx.AsyncClient(base_url=stack.gateway_url, timeout=60) as http:
            for number, plug in enumerate(plugs):
                head, events = what_arrived(plug)
                seen = token_ids("\n".join(events).splitlines())
                assert 0 < len(seen) < NUM_TOKENS
                rest = await come_back(http, head, events[-1])
                assert seen + rest == expected(number)


async def come_back(http: httpx.AsyncClient, head: str, last_event: str) -> list[int]:
    """The tokens after the last event that arrived whole."""
    headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    path = f"/v1/requests/{headers['x-headway-request-id']}/events"
    last_id = last_event.splitlines()[0].removeprefix("id: ")
    wish = {"last-event-id": last_id, "x-headway-resume": headers["x-headway-resume"]}
    rest = await http.get(path, headers=wish)
    assert rest.status_code == 200, rest.text
    return token_ids(rest.text.splitlines())
