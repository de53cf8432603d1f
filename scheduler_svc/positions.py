"""Who is told where its request waits, and when."""

from itertools import islice
from typing import Protocol


class PositionReader(Protocol):
    """A session that wants to know where one of its requests waits."""

    def tell_position(self) -> bool:
        """Send the position if it changed; False when there is nothing to tell any more."""


class Positions:
    """Turns of those who want positions: bounded work each tick, everybody in turn."""

    def __init__(self, max_per_tick: int) -> None:
        self._max_per_tick = max_per_tick
        # whose turn is next comes first
        self._readers: dict[PositionReader, None] = {}

    def __len__(self) -> int:
        return len(self._readers)

    def add(self, reader: PositionReader) -> None:
        """Until its ``tell_position`` gives False, or it is removed."""
        self._readers[reader] = None

    def remove(self, reader: PositionReader) -> None:
        """It is over; unknown ones are left alone."""
        self._readers.pop(reader, None)

    def tick(self) -> None:
        """Called once each position interval."""
        for reader in list(islice(self._readers, self._max_per_tick)):
            del self._readers[reader]
            if reader.tell_position():
                self._readers[reader] = None
