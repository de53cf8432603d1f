"""Thousands of streams through one gateway process, with readers among them that take nothing.

All streams run on one mock executor, which makes a token for each of them every STEP_MS. A witness
asks the scheduler for a stream by gRPC: a reader's lag is the time from the witness's latest token
to its own next event, so what the gateway adds, and the burst of a whole step, is in it. Some
readers have SLOW_SAMPLES samples in their stream, so that much is written to them. Measured twice:
everybody reads; then these stop. The gateway cuts whoever takes nothing for WRITE_TIMEOUT_S once
the kernel's buffers are full. Ends with one line of JSON.
"""

import argparse
import asyncio
import json
import math
import resource
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import psutil
import uvloop

from bench.stack import Stack
from headway.server import connect
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc

STEP_MS = 1_000
NUM_TOKENS = 30_000  # more than a run takes
RECEIVE_BYTES = 4_096  # of a socket, so that whoever does not read is soon in arrears
NUM_CONNECTS_AT_ONCE = 50
SLOW_SAMPLES = 64
WRITE_TIMEOUT_S = 5


@dataclass(slots=True)
class Lags:
    """How late events came after the step they belong to; only counted while ``is_on``."""

    is_on: bool = False
    stepped_at: float = 0.0
    ms: list[float] = field(default_factory=list)

    def event(self) -> None:
        if self.is_on:
            self.ms.append(1000 * (time.perf_counter() - self.stepped_at))


class Reader(asyncio.Protocol):
    """One stream; its events are counted, not parsed."""

    def __init__(self, request: bytes, lags: Lags) -> None:
        self._request = request
        self._lags = lags
        self.started = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if b"data: " in data:
            self._lags.event()
            if not self.started.done():
                self.started.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.started.done():
            self.started.set_exception(error or ConnectionResetError("before its first event"))


def http_request(address: str, num_samples: int) -> bytes:
    body = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": NUM_TOKENS, "n": num_samples}
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-length: {len(data)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + data


async def open_readers(address: str, lags: Lags, number: int, num_samples: int = 1) -> list[Reader]:
    """Connected a few at a time; each has had its first event."""
    readers: list[Reader] = []
    while len(readers) < number:
        num_more = min(number - len(readers), NUM_CONNECTS_AT_ONCE)
        more = [open_reader(address, lags, num_samples) for _ in range(num_more)]
        readers += await asyncio.gather(*more)
    await asyncio.gather(*[reader.started for reader in readers])
    return readers


async def open_reader(address: str, lags: Lags, num_samples: int) -> Reader:
    host, port = address.split(":")
    loop = asyncio.get_running_loop()
    plug = socket.socket()
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    plug.setblocking(False)
    await loop.sock_connect(plug, (host, int(port)))
    request = http_request(address, num_samples)
    _, reader = await loop.create_connection(lambda: Reader(request, lags), sock=plug)
    return reader


async def follow_witness(stub: scheduler_pb2_grpc.SchedulerServiceStub, lags: Lags) -> None:
    request = generation_pb2.GenerationRequest(
        model="mock",
        prompt_token_ids=[9],
        sampling=generation_pb2.SamplingParams(max_tokens=NUM_TOKENS),
    )
    async for message in stub.Generate(scheduler_pb2.GenerateRequest(request=request)):
        if message.HasField("frame"):
            lags.stepped_at = time.perf_counter()


async def measure(arguments: argparse.Namespace, stack: Stack) -> dict[str, object]:
    gateway = psutil.Process(stack.gateway.pid)
    address = urlsplit(stack.gateway_url).netloc
    lags = Lags()
    async with connect(stack.scheduler_address, max_message_bytes=1 << 24) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        witness = asyncio.create_task(follow_witness(stub, lags))
        slow = await open_readers(address, Lags(), arguments.slow, SLOW_SAMPLES)
        before = gateway.memory_info().rss
        readers = await open_readers(address, lags, arguments.streams)
        grown = gateway.memory_info().rss - before

        all_read = await phase(lags, gateway, arguments.seconds)
        for reader in slow:
            reader.transport.pause_reading()
        slow_stopped = await phase(lags, gateway, arguments.seconds)
        num_cut = sum(line["event"] == "request.finished" for line in stack.scheduler.lines)
        for reader in (*readers, *slow):
            reader.transport.abort()
        witness.cancel()
        await asyncio.gather(witness, return_exceptions=True)
    return {
        "bench": "streams",
        "streams": len(readers),
        "step_ms": STEP_MS,
        "kib_per_stream": round(grown / 1024 / len(readers), 1),
        "slow_readers": len(slow),
        "slow_readers_cut": num_cut,
        "all_read": all_read,
        "slow_stopped": slow_stopped,
    }


async def phase(lags: Lags, gateway: psutil.Process, seconds: float) -> dict[str, float]:
    """Lags of those who read, and what the gateway used and grew by meanwhile."""
    lags.ms, lags.is_on = [], True
    used, rss = gateway.cpu_times(), gateway.memory_info().rss
    await asyncio.sleep(seconds)
    lags.is_on = False
    now = gateway.cpu_times()
    cpu_s = now.user + now.system - used.user - used.system
    values = sorted(lags.ms)
    return {
        "events": len(values),
        "lag_ms_p50": round(percentile(values, 0.5), 1),
        "lag_ms_p99": round(percentile(values, 0.99), 1),
        "gateway_cores": round(cpu_s / seconds, 3),
        "gateway_grown_mib": round((gateway.memory_info().rss - rss) / (1 << 20), 1),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values: the least one that so many are not above."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=2_000, help="at once")
    parser.add_argument("--slow", type=int, default=30, help="readers that stop, beside them")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each part")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    num_seats = 1 + arguments.streams + arguments.slow * SLOW_SAMPLES
    executor = {
        "max_num_seqs": num_seats,
        "max_num_batched_tokens": num_seats,
        "mock_step_ms": STEP_MS,
    }
    scheduler = {"generate_flush_ms": 0}
    gateway = {"stream_write_timeout_s": WRITE_TIMEOUT_S}
    with Stack.start(scheduler=scheduler, executor=executor, gateway=gateway) as stack:
        figures = uvloop.run(measure(arguments, stack))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
