"""A bell does what an event does, for one task and without a system call."""

import asyncio

import pytest

from headway.bell import Bell


async def test_whoever_waits_goes_on_when_it_is_rung() -> None:
    bell = Bell(asyncio.get_running_loop())
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    bell.set()
    bell.clear()  # it was rung, all the same
    await waiting
    assert not bell.is_set()


async def test_a_bell_that_was_rung_keeps_nobody_waiting_until_it_is_cleared() -> None:
    bell = Bell(asyncio.get_running_loop())
    bell.set()
    bell.set()
    await bell.wait()
    await bell.wait()
    bell.clear()
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_a_task_that_was_cancelled_leaves_the_bell_to_the_next_one() -> None:
    bell = Bell(asyncio.get_running_loop())
    for is_rung in (False, True):
        waiting = asyncio.create_task(bell.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        if is_rung:
            bell.set()  # before the task has run again
        with pytest.raises(asyncio.CancelledError):
            await waiting
        bell.clear()
    again = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    bell.set()
    await again


async def test_two_tasks_that_wait_are_a_mistake_of_ours() -> None:
    bell = Bell(asyncio.get_running_loop())
    waiting = asyncio.create_task(bell.wait())
    await asyncio.sleep(0)
    with pytest.raises(AssertionError, match="one task at a time"):
        await bell.wait()
    bell.set()
    await waiting
