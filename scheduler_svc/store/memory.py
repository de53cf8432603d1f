"""The store that forgets with its process: for tests, simulation and installations without disk.

Bounded three ways: results live ``result_ttl_ms``, hold at most ``max_result_bytes`` together
(the oldest go first), and ids of results that went are remembered up to ``max_tombstones``.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from headway.errors import HeadwayError
from headway.reasons import Reason
from scheduler_svc.store.base import AcceptedRecord, FinishedRecord, StoreRecord

# What a result costs in memory besides its own bytes, rounded up: short ones are mostly this.
_OVERHEAD_BYTES = 512


def _num_bytes(record: FinishedRecord) -> int:
    return _OVERHEAD_BYTES + len(record.result)


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class MemoryStore:
    """Keeps results only: requests that have not ended die with the process that ran them."""

    def __init__(
        self,
        *,
        result_ttl_ms: int,
        max_result_bytes: int,
        max_tombstones: int,
        clock_ms: Callable[[], int] = _monotonic_ms,
    ) -> None:
        self._result_ttl_ms = result_ttl_ms
        self._max_result_bytes = max_result_bytes
        self._max_tombstones = max_tombstones
        self._clock_ms = clock_ms
        # oldest first, because all results live equally long
        self._results: OrderedDict[str, tuple[int, FinishedRecord]] = OrderedDict()
        self._num_bytes = 0
        # request_id -> tenant
        self._tombstones: OrderedDict[str, str] = OrderedDict()

    async def open(self) -> int:
        """The wall clock in microseconds: above the last start's without anything on disk, as
        long as the clock is not set back between two starts."""
        return time.time_ns() // 1_000

    async def commit(self, records: Sequence[StoreRecord]) -> None:
        """Cannot fail."""
        for record in records:
            match record:
                case AcceptedRecord():
                    pass
                case FinishedRecord():
                    self._put(record)
        self._evict()

    async def get_result(self, request_id: str, tenant: str) -> FinishedRecord:
        """See Store."""
        self._evict()
        found = self._results.get(request_id)
        if found is not None and found[1].tenant == tenant:
            return found[1]
        if self._tombstones.get(request_id) == tenant:
            raise HeadwayError(Reason.RESULT_EXPIRED, "The result is no longer kept.")
        raise HeadwayError(Reason.REQUEST_NOT_FOUND, "No such request.")

    async def expire(self) -> None:
        """See Store."""
        self._evict()

    async def close(self) -> None:
        """See Store."""
        self._results.clear()
        self._tombstones.clear()
        self._num_bytes = 0

    def _put(self, record: FinishedRecord) -> None:
        if record.request_id in self._results or record.request_id in self._tombstones:
            return
        self._results[record.request_id] = (self._clock_ms() + self._result_ttl_ms, record)
        self._num_bytes += _num_bytes(record)

    def _evict(self) -> None:
        now_ms = self._clock_ms()
        while self._results:
            request_id, (expires_ms, record) = next(iter(self._results.items()))
            if expires_ms > now_ms and self._num_bytes <= self._max_result_bytes:
                break
            del self._results[request_id]
            self._num_bytes -= _num_bytes(record)
            self._tombstones[request_id] = record.tenant
        while len(self._tombstones) > self._max_tombstones:
            self._tombstones.popitem(last=False)
