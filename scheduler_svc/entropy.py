"""Unguessable bytes, fetched from the operating system a few hundred requests ahead.

A system call for each would be one more place where a busy machine puts the process aside. Nothing
is given out twice: the process never forks.
"""

import os

_FETCHED_BYTES = 8_192


class Entropy:
    """A reserve of bytes as good as those of ``secrets``."""

    def __init__(self) -> None:
        self._reserve = b""
        self._at = 0

    def take(self, num_bytes: int) -> bytes:
        """Bytes that nobody had before; at most ``_FETCHED_BYTES``."""
        start, self._at = self._at, self._at + num_bytes
        if self._at > len(self._reserve):
            self._reserve = os.urandom(_FETCHED_BYTES)
            start, self._at = 0, num_bytes
        return self._reserve[start : self._at]
