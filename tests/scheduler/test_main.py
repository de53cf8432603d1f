"""The real process: what it logs, and how it ends."""

import asyncio
import json
import signal
import socket
import sys

from grpc_health.v1 import health_pb2, health_pb2_grpc

from headway.server import connect


async def test_the_process_says_where_it_listens_and_ends_in_order() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scheduler_svc", "--port", "0"), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    started = json.loads(await process.stderr.readline())
    assert (started["event"], started["host"]) == ("server.started", "127.0.0.1")
    async with connect(f"127.0.0.1:{started['port']}", max_message_bytes=1 << 20) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    process.send_signal(signal.SIGTERM)
    lines = (await process.stderr.read()).splitlines()
    assert await process.wait() == 0
    assert [json.loads(line)["event"] for line in lines] == ["drain.started", "server.stopped"]


async def test_an_address_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scheduler_svc", "--port", str(port)),
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
    assert process.returncode == 1
    lines = [line for line in errors.decode().splitlines() if "add_port.cc" not in line]  # gRPC's
    assert lines == [f"headway-scheduler: cannot listen on 127.0.0.1:{port}"]
