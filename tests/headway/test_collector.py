"""The garbage collector runs when it disturbs nobody, and is left as it was."""

import asyncio
import gc
import weakref

import pytest

from headway.collector import Collector, scheduled
from scheduler_svc.settings import SchedulerSettings


class Node:
    """Half of a cycle, which only a full collection frees once it is old."""

    def __init__(self) -> None:
        self.other: Node | None = None


def old_cycle() -> weakref.ref[Node]:
    """Garbage that survived the collections of the young."""
    one, other = Node(), Node()
    one.other, other.other = other, one
    gc.collect(1)
    return weakref.ref(one)


def test_no_full_collection_starts_by_itself_and_all_is_restored() -> None:
    before, num_frozen = gc.get_threshold(), gc.get_freeze_count()
    phases: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        phases.append(info["generation"])

    with scheduled(100, 2):
        assert gc.get_freeze_count() > num_frozen
        gc.callbacks.append(note)
        kept = [[number] for number in range(100_000)]
        gc.callbacks.remove(note)
    assert len(kept) == 100_000
    assert set(phases) == {0, 1}
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)


def test_everything_is_collected_when_few_are_live_or_after_long() -> None:
    live, now_ms = 0, 1_000
    settings = SchedulerSettings(collect_max_live=5, collect_longest_ms=60_000)
    collector = Collector(settings, lambda: live, lambda: now_ms)
    with scheduled(700, 10):
        live, garbage = 6, old_cycle()
        assert not collector.look()
        assert garbage() is not None
        live = 5
        assert collector.look()
        assert garbage() is None
        live, now_ms, garbage = 6, now_ms + 59_999, old_cycle()
        assert not collector.look()
        now_ms += 1
        assert collector.look()
        assert garbage() is None


async def test_the_task_restores_the_collector_when_it_is_cancelled() -> None:
    before = gc.get_threshold()
    settings = SchedulerSettings(collect_young_objects=800, collect_young_rounds=9)
    task = asyncio.create_task(Collector(settings, lambda: 0, lambda: 0).run())
    await asyncio.sleep(0)  # one turn of the loop: it runs up to its own first sleep
    assert gc.get_threshold()[:2] == (800, 9)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gc.get_threshold() == before
