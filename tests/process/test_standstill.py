"""A process that stands still for longer than its peers wait costs nobody a 500.

SIGSTOP, because it is what a machine does that has too much to do: nothing is closed, nothing is
refused, and afterwards everything goes on where it was.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from bench.stack import Process, Stack
from tests.process.hostile_cases import COMPLETION, ENTRY

WAIT_S = 60.0
NUM_CLIENTS = 8
NUM_STOPS = 3
VICTIM = "executor-1"
# a machine that is busy besides may lose executors by itself
PATIENCE = {"heartbeat_interval_ms": 100, "heartbeat_timeout_ms": 500, "max_attempts": 100}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    # every request looks its model up, so that there is a call under way at any time
    gateway = {"model_ttl_s": 1e-6, "num_text_workers": 0}
    with Stack.start(executors=2, scheduler=PATIENCE, gateway=gateway) as stack:
        yield stack


class Crowd:
    """Clients that ask all the while, and their answers."""

    def __init__(self, url: str) -> None:
        self.answers: list[httpx.Response] = []
        self._url = url
        self._news = asyncio.Condition()
        self._is_over = False

    async def asks(self, num_times: int) -> None:
        """Until so many more answers came."""
        most = len(self.answers) + num_times
        async with self._news:
            await self._news.wait_for(lambda: len(self.answers) >= most)

    async def _keep_asking(self, client: httpx.AsyncClient) -> None:
        while not self._is_over:
            self.answers.append(await client.post(ENTRY, content=COMPLETION))
            async with self._news:
                self._news.notify_all()

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """For the length of a block."""
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=WAIT_S) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(NUM_CLIENTS):
                group.create_task(self._keep_asking(client))
            yield
            self._is_over = True


def is_the_victim(line: dict[str, Any]) -> bool:
    """Other executors may be lost besides."""
    return line.get("executor_id", VICTIM) == VICTIM


async def stop(victim: Process, witness: Process, lost: str, back: str) -> None:
    """Until the witness has given it up; then until it is back, or the next stop might meet one
    that nobody could lose."""
    num_lines = len(witness.lines)
    victim.signal(signal.SIGSTOP)
    try:
        await asyncio.to_thread(witness.wait_for, lost, is_the_victim, start=num_lines)
    finally:
        victim.signal(signal.SIGCONT)
    if back:
        await asyncio.to_thread(witness.wait_for, back, is_the_victim, start=num_lines)


@pytest.mark.parametrize("name", ["scheduler", "executor", "gateway"])
async def test_it_is_waited_for_or_replaced(stack: Stack, name: str) -> None:
    victim, witness, lost, back = {
        # who asks the gateway notices when the scheduler is back
        "scheduler": (stack.scheduler, stack.gateway, "scheduler.lost", ""),
        "executor": (stack.executors[0], stack.scheduler, "executor.lost", "executor.attached"),
        "gateway": (stack.gateway, stack.scheduler, "client.lost", "client.attached"),
    }[name]
    crowd = Crowd(stack.gateway_url)
    async with asyncio.timeout(WAIT_S), crowd.asking():
        for _ in range(NUM_STOPS):
            await stop(victim, witness, lost, back)
            await crowd.asks(10 * NUM_CLIENTS)
    odd = {answer.status_code: answer.text for answer in crowd.answers if answer.status_code != 200}
    assert set(odd) <= {503}, odd
    for process in (stack.scheduler, *stack.executors, stack.gateway):
        errors = [x for x in process.lines if x.get("level") == "error" or "text" in x]
        assert not errors, f"{process.name}: {errors[:3]}"
