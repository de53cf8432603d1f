"""One Attach call, on a clock that the test moves: whose silence it was."""

import asyncio
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from executor_svc.core.session import Session
from executor_svc.stream import Stream, StreamLostError
from headway.v1 import fleet_pb2 as fleet

INTERVAL_MS, TIMEOUT_MS = 10, 900
STUCK_S = 10.0


class SilentCall:
    """A scheduler that takes everything and says nothing."""

    def __init__(self) -> None:
        self._written = asyncio.Semaphore(0)

    async def write(self, message: fleet.AttachRequest) -> None:
        assert message.HasField("heartbeat")
        self._written.release()

    async def read(self) -> Any:
        await asyncio.get_running_loop().create_future()

    async def heartbeat(self) -> None:
        """Until one more came."""
        await self._written.acquire()


class Clock:
    """The loop's, and what the test adds."""

    def __init__(self) -> None:
        self.passed_s = 0.0
        self._loop = asyncio.get_running_loop()

    def time(self) -> float:
        return self._loop.time() + self.passed_s


async def test_after_a_standstill_of_its_own_it_listens_before_it_judges() -> None:
    call: Any = SilentCall()
    clock: Any = Clock()
    session = Session((), num_slots=1, max_models=1, max_leases=1, max_report_tokens=1)
    stream = Stream(
        call,
        session,
        apply=lambda event: None,
        num_steps=lambda: 0,
        max_models=1,
        assets={},
        close_timeout_s=1,
    )
    stream._loop = clock
    welcome = fleet.ExecutorWelcome(
        heartbeat_interval=Duration(nanos=INTERVAL_MS * 1_000_000),
        heartbeat_timeout=Duration(nanos=TIMEOUT_MS * 1_000_000),
    )
    async with asyncio.timeout(STUCK_S):
        talk = asyncio.create_task(stream.converse(welcome))
        for _ in range(3):
            await call.heartbeat()
            clock.passed_s += 20 * TIMEOUT_MS / 1000
        await call.heartbeat()
        assert not talk.done()
        while not talk.done():  # now it is the scheduler that is silent, while the loop turns
            clock.passed_s += TIMEOUT_MS / 4000
            await asyncio.wait([talk], timeout=INTERVAL_MS / 1000)
        with pytest.raises(StreamLostError, match="silent"):
            await talk
