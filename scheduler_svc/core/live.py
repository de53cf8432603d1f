"""The live requests by id.

Rule: cut into shards by the hash of the id, since a dictionary that grows is copied as a whole into
a larger one, and with a million in it everybody waits 30 to 60 ms for that.
"""

from collections.abc import Iterator
from typing import Final

from scheduler_svc.core.domain import RequestRecord

_NUM_SHARDS: Final = 64  # a power of two


class LiveRequests:
    """Accepted and not finished, in no order."""

    __slots__ = ("_len", "_shards")

    def __init__(self) -> None:
        self._shards: list[dict[str, RequestRecord]] = [{} for _ in range(_NUM_SHARDS)]
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._shard(request_id)

    def __iter__(self) -> Iterator[RequestRecord]:
        for shard in self._shards:
            yield from shard.values()

    def get(self, request_id: str) -> RequestRecord | None:
        """The request of this id, None if it is not live."""
        return self._shard(request_id).get(request_id)

    def add(self, record: RequestRecord) -> None:
        """It was accepted; nobody else has its id."""
        self._shard(record.request.request_id)[record.request.request_id] = record
        self._len += 1

    def remove(self, record: RequestRecord) -> None:
        """It finished."""
        del self._shard(record.request.request_id)[record.request.request_id]
        self._len -= 1

    def _shard(self, request_id: str) -> dict[str, RequestRecord]:
        return self._shards[hash(request_id) & (_NUM_SHARDS - 1)]
