"""The live requests by id.

Rule: cut into shards by the hash of the id, since a dictionary that grows is copied as a whole into
a larger one, and with a million in it everybody waits 30 to 60 ms for that.
"""

from collections.abc import Iterator
from typing import Final

from scheduler_svc.core.domain import RequestRecord

_NUM_SHARDS: Final = 64  # a power of two
_LAST_SHARD: Final = _NUM_SHARDS - 1


class LiveRequests:
    """Accepted and not finished, in no order."""

    __slots__ = ("_len", "_shards")

    def __init__(self) -> None:
        self._shards: list[dict[str, RequestRecord]] = [{} for _ in range(_NUM_SHARDS)]
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._shards[hash(request_id) & _LAST_SHARD]

    def __iter__(self) -> Iterator[RequestRecord]:
        for shard in self._shards:
            yield from shard.values()

    def get(self, request_id: str) -> RequestRecord | None:
        """The request of this id, None if it is not live."""
        return self._shards[hash(request_id) & _LAST_SHARD].get(request_id)

    def add(self, record: RequestRecord) -> None:
        """It was accepted; nobody else has its id."""
        request_id = record.request.request_id
        self._shards[hash(request_id) & _LAST_SHARD][request_id] = record
        self._len += 1

    def remove(self, record: RequestRecord) -> None:
        """It finished."""
        request_id = record.request.request_id
        del self._shards[hash(request_id) & _LAST_SHARD][request_id]
        self._len -= 1
