"""Hostile HTTP against a real process: the expected refusal or a close, and it lives on, no larger.

All cases run at once, each on its own connection, while an ordinary client asks as it always does.
"""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import Iterator

import httpx
import psutil
import pytest

from bench.stack import Process, Stack
from tests.process.hostile_cases import CASES, COMPLETION, ENTRY, MIB, Case

WAIT_S = 60.0
AT_ONCE = 40
MAX_GROWTH_BYTES = 128 * MIB
# for what the machine holds up nobody is to blame: no peer is given up, no answer is late
PATIENCE = {"heartbeat_timeout_ms": 600_000}
LIMITS = {
    "submit_timeout_s": WAIT_S,
    "unary_timeout_s": WAIT_S,
    "header_timeout_s": 3,
    "body_timeout_s": 3,
    "keep_alive_s": 1,
    "shutdown_grace_s": 1,
    "num_text_workers": 0,
}
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)")


class Ordeal:
    """Every case's answer, and the gateway before and after."""

    def __init__(self, stack: Stack) -> None:
        self.gateway: Process = stack.gateway
        self._url = stack.gateway_url
        host, port = stack.gateway_url.removeprefix("http://").split(":")
        self._address = host, int(port)
        self._places = asyncio.Semaphore(AT_ONCE)
        self.answers: dict[str, bytes] = {}
        self.has_had_enough: dict[str, bool] = {}
        self.ordinary: list[tuple[int, str]] = []
        self.growth_bytes = 0

    async def run(self) -> None:
        process = psutil.Process(self.gateway.pid)
        async with httpx.AsyncClient(base_url=self._url, timeout=WAIT_S) as client:
            await self._ask(client)
            before = process.memory_info().rss
            tasks = asyncio.gather(*map(self._try, CASES))
            while not tasks.done():
                await self._ask(client)
            await tasks
            self.growth_bytes = process.memory_info().rss - before
            await self._ask(client)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        # a connection of its own: an idle one may be closed just when it is asked for something
        alone = {"connection": "close"}
        response = await client.post(ENTRY, content=COMPLETION, headers=alone)
        self.ordinary.append((response.status_code, response.text))

    async def _try(self, case: Case) -> None:
        async with self._places:
            reader, writer = await asyncio.open_connection(*self._address)
            answer = asyncio.create_task(read_all(reader))
            try:
                async with asyncio.timeout(WAIT_S):
                    with contextlib.suppress(ConnectionError):
                        self.has_had_enough[case.name] = await send(case, writer, answer)
                    self.answers[case.name] = await answer
            except TimeoutError:
                pass  # the test of this case says so
            finally:
                answer.cancel()
                writer.transport.abort()


async def send(case: Case, writer: asyncio.StreamWriter, answer: asyncio.Task[bytes]) -> bool:
    """All that the case says; gives whether what is endless was ended by the server."""
    writer.write(case.sent)
    await writer.drain()
    num_sent = 0
    while case.endless and not answer.done():
        if num_sent >= case.most:
            return False
        writer.write(case.endless)
        await writer.drain()
        num_sent += len(case.endless)
    if case.ending == "end":
        writer.write_eof()
    elif case.ending == "reset":
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    return True


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server ends the connection."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(MIB):
            answer += data
    return answer


def statuses(answer: bytes, case: Case) -> tuple[int, ...]:
    """Of every whole answer on the connection; what is no answer fails the test."""
    found = []
    while answer:
        top, end, rest = answer.partition(b"\r\n\r\n")
        assert end, answer[:200]
        status = re.match(rb"HTTP/1\.1 (\d{3}) ", top)
        assert status, answer[:200]
        found.append(int(status[1]))
        length = _LENGTH.search(top)
        is_bodiless = case.sent.startswith(b"HEAD ") or length is None
        answer = rest if is_bodiless else rest[int(length[1]) :]  # type: ignore[index]
    return tuple(found)


@pytest.fixture(scope="module")
def ordeal() -> Iterator[Ordeal]:
    with Stack.start(scheduler=PATIENCE, gateway=LIMITS) as stack:
        ordeal = Ordeal(stack)
        asyncio.run(ordeal.run())
        yield ordeal
        for process in (stack.scheduler, *stack.executors, stack.gateway):
            errors = [x for x in process.lines if x.get("level") == "error" or "text" in x]
            assert not errors, f"{process.name}: {errors[:3]}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused(ordeal: Ordeal, case: Case) -> None:
    assert case.name in ordeal.answers, "it never ended"
    assert ordeal.has_had_enough.get(case.name, True), "it took everything"
    answer = ordeal.answers[case.name]
    if case.ending == "wait":
        assert statuses(answer, case) == case.statuses, answer[:300]
    else:  # whether the first bytes of an answer were out is a race, errors of ours are not
        assert b"HTTP/1.1 5" not in answer
    assert b"Traceback" not in answer
    assert b".py" not in answer


def test_there_are_many_and_all_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 150


def test_others_were_served_all_the_while(ordeal: Ordeal) -> None:
    assert [answer for answer in ordeal.ordinary if answer[0] != 200] == []
    assert len(ordeal.ordinary) > 2


def test_its_memory_is_bounded(ordeal: Ordeal) -> None:
    assert ordeal.growth_bytes < MAX_GROWTH_BYTES, f"{ordeal.growth_bytes / MIB:.0f} MiB"
