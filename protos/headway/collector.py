"""When the garbage collector of CPython runs, so that nobody waits for it.

Rule: what exists at the start lives as long as the process and is frozen: no collection looks at
it again. Young objects are collected as usual, well under a millisecond at a time. A full
collection looks at everything that lives, so it never starts by itself: it runs while few requests
are live, or, since cycles must not pile up for ever, when none was possible for long. Nearly all
garbage here is freed without it, by counting references.
"""

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

# middle collections before CPython would start a full one by itself
_NEVER = 1 << 30


class CollectorSettings(Protocol):
    """What the settings of a process say about it."""

    @property
    def collect_young_objects(self) -> int:
        """Objects made between two collections of the young."""

    @property
    def collect_young_rounds(self) -> int:
        """Of so many, one collects also what survived one before."""

    @property
    def collect_interval_ms(self) -> int:
        """Time between two looks for a good time to collect everything."""

    @property
    def collect_max_live(self) -> int:
        """With so few live requests it is a good time."""

    @property
    def collect_longest_ms(self) -> int:
        """Since the last time; after it any time is good."""


@contextmanager
def scheduled(num_young_objects: int, num_young_rounds: int) -> Iterator[None]:
    """Freeze what exists and let only young objects be collected, until the context ends."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(num_young_objects, num_young_rounds, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


class Collector:
    """Runs full collections at good times. ``num_live``: requests that a pause would hold up."""

    def __init__(
        self, settings: CollectorSettings, num_live: Callable[[], int], clock_ms: Callable[[], int]
    ) -> None:
        self._settings = settings
        self._num_live = num_live
        self._clock_ms = clock_ms
        self._last_ms = clock_ms()

    async def run(self) -> None:
        """Runs until cancelled."""
        settings = self._settings
        with scheduled(settings.collect_young_objects, settings.collect_young_rounds):
            while True:
                await asyncio.sleep(settings.collect_interval_ms / 1_000)
                self.look()

    def look(self) -> bool:
        """Collect everything if now is a good time; whether it was."""
        is_calm = self._num_live() <= self._settings.collect_max_live
        now_ms = self._clock_ms()
        if not is_calm and now_ms - self._last_ms < self._settings.collect_longest_ms:
            return False
        gc.collect()
        self._last_ms = now_ms
        return True
