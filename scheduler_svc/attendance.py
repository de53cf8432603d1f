"""Which futures nobody asks for any more.

Rule: pure; ``now_ms`` is monotonic milliseconds. A future that was given ``abandon_after`` is
looked at when that time has passed since it was last asked for, as far as was known; if it was
asked for meanwhile, it is looked at again later. So being asked for costs but noting the time.
"""

import heapq
from collections.abc import Callable


class Attendance:
    """Futures by when they are to be looked at next."""

    def __init__(self) -> None:
        self._due: list[tuple[int, str, int]] = []  # a heap: (when, request id, abandon_after)

    def __len__(self) -> int:
        return len(self._due)

    @property
    def next_due_ms(self) -> int | None:
        """When ``abandoned`` has something to look at."""
        return self._due[0][0] if self._due else None

    def watch(self, request_id: str, abandon_after_ms: int, now_ms: int) -> None:
        """From now on; once for each request."""
        heapq.heappush(self._due, (now_ms + abandon_after_ms, request_id, abandon_after_ms))

    def abandoned(self, asked_ms: Callable[[str], int | None], now_ms: int) -> list[str]:
        """Futures that nobody has asked for in their time; they are not watched any more.

        ``asked_ms`` says when a request was last asked for; None: it is over.
        """
        found = []
        while self._due and self._due[0][0] <= now_ms:
            _, request_id, abandon_after_ms = heapq.heappop(self._due)
            last_ms = asked_ms(request_id)
            if last_ms is None:
                continue
            if last_ms + abandon_after_ms <= now_ms:
                found.append(request_id)
            else:
                self.watch(request_id, abandon_after_ms, last_ms)
        return found
