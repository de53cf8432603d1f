"""Polls that are held: up to ``hold`` seconds, or until there is something to say.

Nobody is held who has hung up, or while this gateway shuts down.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from gateway_http.client import SchedulerClient
from headway.errors import HeadwayError
from headway.v1 import generation_pb2, scheduler_pb2

T = TypeVar("T")


class Polls:
    """Of one gateway's clients."""

    def __init__(self, client: SchedulerClient, pause_s: float) -> None:
        self._client = client
        self._pause_s = pause_s

    async def result(
        self, request: Request, request_id: str, tenant: str, hold: float
    ) -> generation_pb2.GenerationResult | generation_pb2.QueueStatus | None:
        """A future's result, or where it stands; None if the scheduler could not say."""
        return await self._unless_gone(request, partial(self._retrieve, request_id, tenant), hold)

    async def finished(
        self, request: Request, group: str, cursor: int, tenant: str, hold: float
    ) -> scheduler_pb2.WaitFinishedResponse:
        """Which futures of a group have ended since ``cursor``."""
        ask = partial(self._client.wait_finished, tenant, group, cursor)
        return await self._unless_gone(request, ask, hold)

    async def _unless_gone(
        self, request: Request, ask: Callable[[float], Coroutine[Any, Any, T]], hold: float
    ) -> T:
        """``ask(hold)``, cut short to ``ask(0)`` by a hang-up or a shutdown."""
        if not hold:
            return await ask(0.0)

        async def hang_up() -> None:
            await request.receive()

        held = asyncio.create_task(ask(hold))
        hung_up = asyncio.create_task(hang_up())
        draining = asyncio.create_task(self._client.draining.wait())
        tasks = (held, hung_up, draining)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not held.done():
                return await ask(0.0)
            return held.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _retrieve(
        self, request_id: str, tenant: str, hold: float
    ) -> generation_pb2.GenerationResult | generation_pb2.QueueStatus | None:
        """None: the scheduler could not be asked in all this time.

        An SDK repeats a poll that failed with 5xx at once, so an outage is held like any wait; and
        so is an answer that comes too early, from a scheduler with too many waiters.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + hold
        while True:
            try:
                left = max(deadline - clock(), 0.0)
                outcome = await self._client.retrieve(request_id, tenant, left)
                is_result = isinstance(outcome, generation_pb2.GenerationResult)
                if is_result or deadline - clock() < self._pause_s:
                    return outcome
                pause = self._pause_s
            except HeadwayError as error:
                if error.retry_after_ms is None:
                    raise
                pause = min(error.retry_after_ms / 1000, deadline - clock())
            if pause <= 0:
                return None
            await asyncio.sleep(pause)
