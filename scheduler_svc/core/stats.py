"""What an executor did in the last hour, and how long requests waited.

Rule: time is booked as it passes, in one bucket for each minute, so that a long lease counts in
the minutes it ran and not all at its end, and utilisation is over the time that the executor is
known, not over an hour that it has not seen. Failed leases take time but lower no average.
"""

from collections import deque
from dataclasses import dataclass
from math import ceil
from typing import Final

from scheduler_svc.core.answers import ExecutorStats

HOUR_MS: Final = 3_600_000
_BUCKET_MS: Final = 60_000
_NEVER: Final = -1
_NUM_BUCKETS: Final = HOUR_MS // _BUCKET_MS


@dataclass(slots=True)
class Bucket:
    """Sums over one minute."""

    number: int
    used_slot_ms: int = 0
    slot_ms: int = 0
    num_leases: int = 0
    num_completed: int = 0
    completed_ms: int = 0


class Activity:
    """The rolling hour of one executor."""

    __slots__ = ("_buckets", "_newest", "_num_slots", "_num_used", "_since_ms")

    def __init__(self) -> None:
        # oldest first; at most one hour
        self._buckets: deque[Bucket] = deque()
        # the last of them; one that never was while there is none
        self._newest = Bucket(_NEVER)
        # what has held since then
        self._since_ms = _NEVER
        self._num_used = 0
        self._num_slots = 0

    def note(self, num_used: int, num_slots: int, now_ms: int) -> None:
        """From now on so many slots are used and there."""
        if self._since_ms != now_ms:
            self._book(now_ms)
        self._num_used, self._num_slots = num_used, num_slots

    def ended(self, duration_ms: int, is_completed: bool, now_ms: int) -> None:
        """A lease ended."""
        bucket = self._bucket(now_ms)
        bucket.num_leases += 1
        if is_completed:
            bucket.num_completed += 1
            bucket.completed_ms += duration_ms

    def num_leases(self, now_ms: int) -> int:
        """Leases that ended in the last hour."""
        return sum(bucket.num_leases for bucket in self._last_hour(now_ms))

    def summary(self, num_all_leases: int, affinity: float | None, now_ms: int) -> ExecutorStats:
        """For operators; ``num_all_leases`` is over all executors."""
        buckets = self._last_hour(now_ms)
        open_ms = 0 if self._since_ms == _NEVER else now_ms - self._since_ms
        used_ms = sum(bucket.used_slot_ms for bucket in buckets) + self._num_used * open_ms
        slot_ms = sum(bucket.slot_ms for bucket in buckets) + self._num_slots * open_ms
        num_leases = sum(bucket.num_leases for bucket in buckets)
        num_completed = sum(bucket.num_completed for bucket in buckets)
        completed_ms = sum(bucket.completed_ms for bucket in buckets)
        return ExecutorStats(
            num_leases=num_leases,
            share=num_leases / num_all_leases if num_all_leases else None,
            utilisation=min(1.0, used_ms / slot_ms) if slot_ms else None,
            mean_duration_ms=completed_ms / num_completed if num_completed else None,
            affinity=affinity,
        )

    def _last_hour(self, now_ms: int) -> list[Bucket]:
        first = now_ms // _BUCKET_MS - _NUM_BUCKETS
        return [bucket for bucket in self._buckets if bucket.number > first]

    def _book(self, now_ms: int) -> None:
        """Book the time since the last change, minute by minute; no further back than an hour."""
        if self._since_ms != _NEVER:
            since_ms = max(self._since_ms, now_ms - HOUR_MS)
            while since_ms < now_ms:
                bucket = self._bucket(since_ms)
                until_ms = min(now_ms, (bucket.number + 1) * _BUCKET_MS)
                bucket.used_slot_ms += self._num_used * (until_ms - since_ms)
                bucket.slot_ms += self._num_slots * (until_ms - since_ms)
                since_ms = until_ms
        self._since_ms = now_ms

    def _bucket(self, at_ms: int) -> Bucket:
        number = at_ms // _BUCKET_MS
        if self._newest.number < number:
            buckets = self._buckets
            self._newest = Bucket(number)
            buckets.append(self._newest)
            while buckets[0].number <= number - _NUM_BUCKETS:
                buckets.popleft()
        return self._newest


class Waits:
    """How long requests waited for their first grant: the last hour, at most max_samples."""

    def __init__(self, max_samples: int) -> None:
        # (granted at, waited)
        self._samples: deque[tuple[int, int]] = deque(maxlen=max_samples)

    def add(self, waited_ms: int, now_ms: int) -> None:
        """A request got its first grant."""
        self._samples.append((now_ms, waited_ms))

    def summary(self, now_ms: int) -> tuple[float, float, float, int] | None:
        """(p10, mean, p90, number of samples) by nearest rank; None without samples."""
        waits = sorted(waited for at_ms, waited in self._samples if now_ms - at_ms < HOUR_MS)
        if not waits:
            return None
        mean = sum(waits) / len(waits)
        return nearest_rank(waits, 0.1), mean, nearest_rank(waits, 0.9), len(waits)


def nearest_rank(ordered: list[int], quantile: float) -> float:
    """The smallest value that at least this part of the values does not exceed."""
    return ordered[max(0, ceil(quantile * len(ordered)) - 1)]
