"""The Tinker endpoints alone: their scheduler plays a script, and no socket lies between."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.gateway.tinker_fakes import ScriptedScheduler, client_of


@pytest.fixture
def scheduler() -> ScriptedScheduler:
    return ScriptedScheduler()


@pytest.fixture
async def http(scheduler: ScriptedScheduler) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(scheduler) as client:
        yield client
