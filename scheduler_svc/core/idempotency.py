"""Idempotency keys: which request a (tenant, key) stands for.

Rule: a key is taken when its request is accepted and stays until result_ttl_ms after its end, or
until more than max_finished_keys newer ends push it out. An end that tells its client to try again
frees the key at once, or each try would meet the same end. Live keys are bounded by max_inflight.
"""

from collections import deque
from dataclasses import dataclass

from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.core.messages import Request


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """The request behind a key, and the hash of its body."""

    request_id: str
    body_hash: bytes


class IdempotencyKeys:
    """The bounded table of keys."""

    def __init__(self, settings: CoreSettings) -> None:
        self._settings = settings
        self._entries: dict[tuple[str, str], KeyEntry] = {}
        # (forgotten at, key) of finished requests, in the order of their ends
        self._finished: deque[tuple[int, tuple[str, str]]] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, request: Request, now_ms: int) -> KeyEntry | None:
        """What came before under the same key; None without a key."""
        self._forget(now_ms)
        return self._entries.get((request.tenant, request.idempotency_key))

    def add(self, request: Request) -> None:
        """The request was accepted."""
        if request.idempotency_key:
            key = (request.tenant, request.idempotency_key)
            assert key not in self._entries
            self._entries[key] = KeyEntry(request.request_id, request.body_hash)

    def finished(self, request: Request, is_final: bool, now_ms: int) -> None:
        """The request ended; the key of a final end lives on for the life of the result."""
        if not request.idempotency_key:
            return
        key = (request.tenant, request.idempotency_key)
        if not is_final:
            del self._entries[key]
        else:
            self._finished.append((now_ms + self._settings.result_ttl_ms, key))
            self._forget(now_ms)

    def _forget(self, now_ms: int) -> None:
        finished, limit = self._finished, self._settings.max_finished_keys
        while finished and (finished[0][0] <= now_ms or len(finished) > limit):
            del self._entries[finished.popleft()[1]]
