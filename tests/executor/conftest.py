"""A scheduler that the test plays, and an executor that is linked to it."""

from collections.abc import AsyncIterator

import pytest

from tests.executor.linked import Executor
from tests.executor.scripted_scheduler import ScriptedScheduler


@pytest.fixture
async def scheduler() -> AsyncIterator[ScriptedScheduler]:
    scheduler = ScriptedScheduler()
    await scheduler.start()
    yield scheduler
    await scheduler.stop()


@pytest.fixture
async def executor(scheduler: ScriptedScheduler) -> AsyncIterator[Executor]:
    executor = Executor(scheduler.address)
    yield executor
    await executor.close()
