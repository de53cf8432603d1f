"""Whether others have their turn while something long is done."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def turns_during(work: Awaitable[T]) -> tuple[int, T]:
    """How often others had their turn meanwhile, and what came of it."""
    num_turns = 0

    async def take_turns() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    others = asyncio.create_task(take_turns())
    try:
        result = await work
        return num_turns, result
    finally:
        others.cancel()
