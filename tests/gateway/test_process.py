"""The real process: signals, its grace, and a port that several share."""

import asyncio
import contextlib
import json
import re
import signal
import sys
from collections.abc import AsyncIterator

import httpx

from tests.gateway import tiny_model
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import leave_alone

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def gateway_process(
    scheduler: ScriptedScheduler, *arguments: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A real process that has started, and its base URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "gateway_http", "--shutdown-grace-s", "0.5", "--num-text-workers", "0"),
        *("--scheduler-addresses", f"127.0.0.1:{scheduler.port}", *arguments),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async for text in process.stderr:
            line = json.loads(text)
            if line["event"] == "server.started":
                break
        yield process, f"http://{line['host']}:{line['port']}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def events_to_the_end(process: asyncio.subprocess.Process) -> list[str]:
    assert process.stderr is not None
    return [json.loads(line)["event"] async for line in process.stderr]


async def test_the_process_drains_on_sigterm(scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    async with (
        gateway_process(scheduler, "--port", "0") as (process, url),
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        assert (await http.get("/openapi.json")).status_code == 200  # leaves an idle connection
        body = {**CHAT, "stream": True}
        async with http.stream("POST", PATH, json=body) as response:
            assert response.status_code == 200
            process.send_signal(signal.SIGTERM)
            text = (await response.aread()).decode()
        last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["code"] == "draining"
        await scheduler.until(lambda: len(scheduler.cancelled) == 1)
        rest = await events_to_the_end(process)
        assert await process.wait() == 0
        assert rest[-1] == "server.stopped"


async def test_a_stream_that_ends_within_the_grace_ends_well(scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    async with (
        gateway_process(scheduler, "--port", "0", "--shutdown-grace-s", "20") as (process, url),
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        async with http.stream("POST", PATH, json={**CHAT, "stream": True}) as response:
            process.send_signal(signal.SIGTERM)
            assert "server.draining" in await first_event(process)
            run = scheduler.runs[0]
            run.emit(tiny_model.encode("Late"))
            run.end()
            run.finish()
            scheduler.publish()
            text = (await response.aread()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert await process.wait() == 0


async def first_event(process: asyncio.subprocess.Process) -> str:
    """The next line of the log that tells of the shutdown."""
    assert process.stderr is not None
    async for line in process.stderr:
        if b"server." in line:
            return str(json.loads(line)["event"])
    raise AssertionError("it ended without a word")


async def test_processes_share_a_port_and_one_may_go(scheduler: ScriptedScheduler) -> None:
    async with gateway_process(scheduler, "--port", "0", "--reuse-port") as (first, url):
        port = url.rpartition(":")[2]
        async with gateway_process(scheduler, "--port", port, "--reuse-port") as (second, _):
            answered: set[str] = set()
            while len(answered) < 2:  # which of both answers is the kernel's choice
                async with httpx.AsyncClient(base_url=url) as http:
                    text = (await http.get("/metrics")).text
                    start = re.search(r"^process_start_time_seconds (.*)$", text, re.MULTILINE)
                    assert start
                    answered.add(start[1])
            second.terminate()
            assert await second.wait() == 0
        for _ in range(10):
            async with httpx.AsyncClient(base_url=url) as http:
                assert (await http.get("/health")).status_code == 200
        assert first.returncode is None
