"""What a log line looks like, and what it never holds."""

import asyncio
import io
import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog

from headway import logs

PROGRAM = """
import structlog
from headway import logs
logs.configure("example", "info")
log = structlog.get_logger()
log.debug("request.admitted")
prompt = "canary-prompt"
try:
    raise ValueError("broken")
except ValueError:
    log.exception("call.failed", method="Submit")
"""


def test_lines_are_json_and_tracebacks_hold_no_local_variables() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    line = json.loads(run.stderr)
    assert (line["event"], line["process"], line["level"]) == ("call.failed", "example", "error")
    assert line["method"] == "Submit"
    assert "broken" in run.stderr.decode()
    assert "canary" not in run.stderr.decode()


def test_lines_say_when(monkeypatch: pytest.MonkeyPatch) -> None:
    add_time, now = logs._add_time(), datetime(2026, 2, 28, 23, 59, 59, 7, UTC)
    for _ in range(3):
        stamp = round(now.timestamp() * 1_000_000) * 1_000
        monkeypatch.setattr(time, "time_ns", lambda stamp=stamp: stamp)
        event: structlog.typing.EventDict = {"event": "server.started"}
        add_time(None, "info", event)
        assert event["timestamp"] == now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        now += timedelta(milliseconds=600)


class Writes(io.BytesIO):
    """Remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))
        return len(self.pieces[-1])


def test_a_terminal_is_not_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.configure("test", "info")
    try:
        structlog.get_logger().info("stream.cut", path="/\x1b[2Jü", text="all is well")
    finally:
        structlog.reset_defaults()
    line = terminal.getvalue()
    assert "/\\x1b[2J" in line
    assert "[2J" not in line.replace("\\x1b[2J", "")
    assert "all is well" in line


def test_lines_of_one_turn_leave_in_one_write() -> None:
    file = Writes()
    lines = logs.Lines(file)

    async def log_in_turns() -> None:
        lines.info(b"1")
        lines.info(b"2")
        assert file.pieces == []
        await asyncio.sleep(0)
        assert file.pieces == [b"1\n2\n"]
        lines.info(b"3")
        await asyncio.to_thread(lines.info, b"4")  # a thread does not wait for the loop's turn
        lines.info(b"5")

    asyncio.run(log_in_turns())
    assert b"".join(file.pieces) == b"1\n2\n3\n4\n5\n"
    lines.info(b"6")
    assert file.pieces[-1] == b"6\n"


def test_a_loop_that_died_early_takes_no_line_along() -> None:
    file = Writes()
    lines = logs.Lines(file)

    async def log(line: bytes) -> None:
        lines.info(line)

    dead = asyncio.new_event_loop()
    task = dead.create_task(log(b"1"))
    dead.call_soon(dead.stop)
    dead.run_forever()
    assert task.done()
    dead.close()
    assert file.pieces == []
    asyncio.run(log(b"2"))
    assert file.pieces == [b"1\n2\n"]


def test_the_last_lines_are_written_when_the_process_ends_in_the_middle_of_a_turn() -> None:
    program = """
import asyncio, sys, structlog
from headway import logs
logs.configure("example", "info")
async def main():
    structlog.get_logger().info("server.stopped")
    sys.exit(3)
asyncio.run(main())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert run.returncode == 3
    assert json.loads(run.stderr)["event"] == "server.stopped"


def test_a_warning_does_not_wait_for_the_end_of_the_turn() -> None:
    file = Writes()
    lines = logs.Lines(file)

    async def warn() -> None:
        lines.info(b"1")
        lines.warning(b"2")
        assert file.pieces == [b"1\n2\n"]
        lines.info(b"3")

    asyncio.run(warn())
    assert file.pieces == [b"1\n2\n", b"3\n"]


def test_whoever_ends_the_process_at_once_can_write_the_last_lines() -> None:
    program = """
import asyncio, os, structlog
from headway import logs
logs.configure("example", "info")
async def main():
    structlog.get_logger().info("server.stopped")
    logs.flush()
    os._exit(3)
asyncio.run(main())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert run.returncode == 3
    assert json.loads(run.stderr)["event"] == "server.stopped"


def test_a_log_that_nobody_reads_stops_no_work() -> None:
    program = """
import asyncio, sys, structlog
from headway import logs
logs.configure("example", "info")
async def main():
    sys.stdin.read()  # until nobody reads
    structlog.get_logger().error("request.crashed")
    structlog.get_logger().info("server.stopped")
    await asyncio.sleep(0)
    logs.flush()
    print("went on")
asyncio.run(main())
"""
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        process.stderr.close()
        process.stderr = None
        said, _ = process.communicate(timeout=60)
    assert said == "went on\n"
