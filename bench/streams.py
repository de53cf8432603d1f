"""Thousands of streams through one gateway process, with readers among them that stop.

The many run on one mock executor, which makes a token for each of them every second. A witness
asks the scheduler for a stream by gRPC: a reader's lag is the time from the witness's latest token
to its own next event, so what the gateway adds, and the burst of a whole step, is in it.

The few have a key each and SLOW_TOKENS tokens a step with NUM_TOP alternatives, from an executor of
their own, so that much is written to them. Four parts of one run: the many alone; the few read,
too; the few stop, and are cut off after four seconds; they come back with their Last-Event-ID.
Ends with one line of JSON.
"""

import argparse
import asyncio
import json
import re
import resource
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar, cast
from urllib.parse import urlsplit

import psutil
import uvloop

from bench.arguments import parser_of
from bench.figures import cpu_s, percentile
from bench.stack import Stack
from headway.server import connect
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc

EARLY_SHARE = 0.05  # of a step, by which a reader may hear of it before the witness does
NUM_TOKENS = 30_000  # more than a run takes
RECEIVE_BYTES = 4_096  # of a socket, so that whoever does not read is soon in arrears
NUM_CONNECTS_AT_ONCE = 50
NUM_RETURNS_AT_ONCE = 10  # each is sent all that it missed
SLOW_TOKENS = 24
NUM_TOP = 20
FAST, SLOW = "mock", "rich"
R = TypeVar("R", bound="Reader")
_EVENT_ID = re.compile(rb"id: (\S+)\n")


@dataclass(slots=True)
class Lags:
    """How late events came after the step they belong to; only counted while ``is_on``."""

    step_ms: float
    is_on: bool = False
    stepped_at: float = 0.0
    ms: list[float] = field(default_factory=list)

    def event(self) -> None:
        if self.is_on:
            lag_ms = 1000 * (time.perf_counter() - self.stepped_at)
            self.ms.append(lag_ms if lag_ms < (1 - EARLY_SHARE) * self.step_ms else 0.0)


class Reader(asyncio.Protocol):
    """One stream; its events are counted, not parsed."""

    def __init__(self, request: bytes, lags: Lags | None = None) -> None:
        self._request = request
        self._lags = lags
        self._head = b""
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    @classmethod
    async def open(cls, address: str, request: bytes, lags: Lags | None = None) -> Self:
        host, port = address.split(":")
        loop = asyncio.get_running_loop()
        plug = socket.socket()
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        plug.setblocking(False)
        await loop.sock_connect(plug, (host, int(port)))
        _, reader = await loop.create_connection(lambda: cls(request, lags), sock=plug)
        return reader

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.started.done():
            self._head += data
            if not self._head.startswith(b"HTTP/1.1 200"):
                self.started.set_exception(ConnectionError(self._head.decode()))
            elif b"data: " in self._head:
                self.started.set_result(None)
        elif self._lags is not None and b"data: " in data:
            self._lags.event()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)
        if not self.started.done():
            self.started.set_exception(error or ConnectionResetError("before its first event"))


class Stopper(Reader):
    """A reader that stops, and knows the last event that it has whole."""

    def __init__(self, request: bytes, lags: Lags | None = None) -> None:
        super().__init__(request, lags)
        self._tail = b""
        self.last_id = ""
        self.num_bytes_late = 0
        self._is_late = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        whole, end, self._tail = (self._tail + data).rpartition(b"\n\n")
        ids = _EVENT_ID.findall(whole) if end else ()
        if ids:
            self.last_id = ids[-1].decode()
        if self._is_late:
            self.num_bytes_late += len(data)

    def stop(self) -> None:
        self.transport.pause_reading()

    async def drain(self) -> None:
        """Read what had been sent all the same, up to the cut."""
        self._is_late = True
        self.transport.resume_reading()
        await self.ended

    def way_back(self, address: str) -> bytes:
        """The request for what comes after the last event."""
        found = re.search(rb"x-headway-resume: (.*)\r\n", self._head)
        assert found, self._head
        path = f"/v1/requests/{self.last_id.rpartition(':')[0]}/events"
        head = f"GET {path} HTTP/1.1\r\nhost: {address}\r\nlast-event-id: {self.last_id}\r\n"
        return f"{head}x-headway-resume: {found[1].decode()}\r\n\r\n".encode()


def http_request(address: str, model: str, **changes: object) -> bytes:
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": NUM_TOKENS, "stream": True}
    data = json.dumps(body | changes).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-length: {len(data)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + data


def slow_request(address: str, number: int) -> bytes:
    """Under a key, so that it goes on without its reader."""
    request = http_request(address, SLOW, logprobs=NUM_TOP)
    return request.replace(b"\r\n", b"\r\nidempotency-key: slow-%d\r\n" % number, 1)


async def open_readers(
    kind: type[R],
    address: str,
    requests: Sequence[bytes],
    lags: Lags | None = None,
    num_at_once: int = NUM_CONNECTS_AT_ONCE,
) -> list[R]:
    """Connected a few at a time; each has had its first event."""
    readers: list[R] = []
    for start in range(0, len(requests), num_at_once):
        some = requests[start : start + num_at_once]
        opened = await asyncio.gather(*(kind.open(address, one, lags) for one in some))
        readers += opened
        await asyncio.gather(*(reader.started for reader in opened))
    return readers


async def follow_witness(stub: scheduler_pb2_grpc.SchedulerServiceStub, lags: Lags) -> None:
    request = generation_pb2.GenerationRequest(
        model=FAST,
        prompt_token_ids=[9],
        sampling=generation_pb2.SamplingParams(max_tokens=NUM_TOKENS),
    )
    async for message in stub.Generate(scheduler_pb2.GenerateRequest(request=request)):
        if message.HasField("frame"):
            lags.stepped_at = time.perf_counter()


async def measure(arguments: argparse.Namespace, stack: Stack) -> dict[str, object]:
    gateway = psutil.Process(stack.gateway.pid)
    address = urlsplit(stack.gateway_url).netloc
    lags = Lags(arguments.step_ms)
    async with connect(stack.scheduler_address, max_message_bytes=1 << 24) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        witness = asyncio.create_task(follow_witness(stub, lags))
        before = gateway.memory_info().rss
        wishes = [http_request(address, FAST)] * arguments.streams
        readers = await open_readers(Reader, address, wishes, lags)
        grown = gateway.memory_info().rss - before
        print(f"{len(readers)} readers, {grown >> 20} MiB of the gateway", flush=True)

        alone = await phase("alone", lags, gateway, arguments.seconds)
        wishes = [slow_request(address, number) for number in range(arguments.slow)]
        slow = await open_readers(Stopper, address, wishes)
        all_read = await phase("all_read", lags, gateway, arguments.seconds)
        for stopper in slow:
            stopper.stop()
        slow_stopped = await phase("slow_stopped", lags, gateway, arguments.seconds)
        causes = await asyncio.to_thread(wait_for_cuts, stack, len(slow))
        for stopper in slow:
            await stopper.drain()
        wishes = [stopper.way_back(address) for stopper in slow]
        back = await open_readers(Reader, address, wishes, num_at_once=NUM_RETURNS_AT_ONCE)
        slow_back = await phase("slow_back", lags, gateway, arguments.seconds)

        num_lost = sum(reader.ended.done() for reader in (*readers, *back))
        for reader in (*readers, *back):
            reader.transport.abort()
        witness.cancel()
        await asyncio.gather(witness, return_exceptions=True)
    return {
        "bench": "streams",
        "streams": len(readers),
        "step_ms": arguments.step_ms,
        "kib_per_stream": round(grown / 1024 / len(readers), 1),
        "slow_readers": len(slow),
        "cut": {cause: causes.count(cause) for cause in set(causes)},
        "kib_sent_to_each_stopped": round(
            statistics.fmean(reader.num_bytes_late for reader in slow) / 1024, 1
        ),
        "came_back": len(back),
        "lost": num_lost,
        "alone": alone,
        "all_read": all_read,
        "slow_stopped": slow_stopped,
        "slow_back": slow_back,
    }


def wait_for_cuts(stack: Stack, number: int) -> list[str]:
    """Why each of so many streams was cut off."""

    def causes() -> list[str]:
        return [line["cause"] for line in stack.gateway.lines if line["event"] == "stream.cut"]

    stack.gateway.wait_for("stream.cut", lambda _: len(causes()) >= number)
    return causes()


async def phase(name: str, lags: Lags, gateway: psutil.Process, seconds: float) -> dict[str, float]:
    """Lags of the many, and what the gateway used, and grew by at most, meanwhile."""
    lags.ms, lags.is_on = [], True
    before_s, rss = cpu_s(gateway.pid), gateway.memory_info().rss
    most = rss
    for _ in range(10):
        await asyncio.sleep(seconds / 10)
        most = max(most, gateway.memory_info().rss)
    lags.is_on = False
    used_s = cpu_s(gateway.pid) - before_s
    values = sorted(lags.ms)
    found = {
        "events": len(values),
        "lag_ms_p50": round(percentile(values, 0.5), 1),
        "lag_ms_p99": round(percentile(values, 0.99), 1),
        "gateway_cores": round(used_s / seconds, 3),
        "gateway_grown_mib": round((most - rss) / (1 << 20), 1),
    }
    print(f"{name}: {found}", flush=True)
    return found


def main() -> None:
    parser = parser_of("bench.streams", __doc__)
    parser.add_argument("--streams", type=int, default=2_000, help="at once")
    parser.add_argument("--slow", type=int, default=100, help="readers that stop, beside them")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each part")
    parser.add_argument("--step-ms", type=int, default=1_000, help="from token to token")
    parser.add_argument("--write-timeout-s", type=float, default=4.0, help="then they are cut off")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    scheduler = {"generate_flush_ms": 0, "resume_grace_ms": 600_000, "drain_timeout_ms": 0}
    gateway = {"stream_write_timeout_s": arguments.write_timeout_s}
    fast = seats(1 + arguments.streams, arguments.step_ms)
    with Stack.start(scheduler=scheduler, executor=fast, gateway=gateway) as stack:
        models = {"mock_models": SLOW, "mock_tokens_per_step": SLOW_TOKENS}
        rich = seats(arguments.slow, arguments.step_ms)
        slow = stack.start_executor({"engine": "mock", **rich, **models})
        slow.wait_for("executor.attached")
        figures = uvloop.run(measure(arguments, stack))
    print(json.dumps(figures))


def seats(number: int, step_ms: int) -> dict[str, object]:
    """Settings of a mock executor with so many."""
    counts = {"max_num_seqs": number, "max_num_batched_tokens": number}
    return {**counts, "mock_step_ms": step_ms, "drain_timeout_ms": 0}


if __name__ == "__main__":
    main()
