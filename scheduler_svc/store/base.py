"""What a store promises: what was committed is there after a restart, if the store is durable.

The runtime calls ``commit`` once for each batch of events (group commit) and sends nothing of
the batch before it returned. Reading consumes nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class AcceptedRecord(NamedTuple):
    """A request in our care; ``body`` is its serialized GenerationRequest with all defaults."""

    request_id: str
    tenant: str
    idempotency_key: str
    body_hash: bytes
    body: bytes


class FinishedRecord(NamedTuple):
    """The one end of a request; ``result`` is its serialized GenerationResult."""

    request_id: str
    tenant: str
    result: bytes


StoreRecord = AcceptedRecord | FinishedRecord


class Store(Protocol):
    """One transaction at a time; callers never overlap ``commit``."""

    async def open(self) -> int:
        """Make ready; gives this start's epoch, above every epoch given before."""

    async def commit(self, records: Sequence[StoreRecord]) -> None:
        """All or nothing. A second end of the same request is ignored: the first one counts."""

    async def get_result(self, request_id: str, tenant: str) -> FinishedRecord:
        """Raises HeadwayError REQUEST_NOT_FOUND or, while that is remembered, RESULT_EXPIRED.
        Another tenant's request is not found, expired or not."""

    async def expire(self) -> None:
        """Forget what is past its time; called now and then."""

    async def close(self) -> None:
        """Let go of everything."""
