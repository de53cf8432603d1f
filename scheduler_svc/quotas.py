"""What each key of a tenant may ask for: checked at the door, before the core sees the request.

Rule: pure; ``now_ms`` is monotonic milliseconds. A rate is a bucket that leaks: what was asked for
goes in, and leaks out at the rate of the request at hand; what does not fit is refused, with the
time until it would. A request is charged for all that it may generate, and the rest is given back
at its end. What the core refuses or finds to be a replay is given back whole; a replay of a request
that has not ended is not even charged.

At most ``max_keys`` keys are remembered. One that has nothing accepted makes room, the longest idle
first, and starts anew when it comes back.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2 as generation
from scheduler_svc.core.messages import Request

_Key = tuple[str, str]  # (tenant, key_id)
_SLACK = 1e-12  # of a capacity: what floating point may lose


@dataclass(slots=True)
class _Bucket:
    level: float = 0.0
    at_ms: int = 0

    def leak(self, per_ms: float, now_ms: int) -> None:
        self.level = max(0.0, self.level - per_ms * (now_ms - self.at_ms))
        self.at_ms = now_ms

    def wait_ms(self, amount: float, capacity: float, per_ms: float) -> int:
        """Until the amount fits; 0: it does."""
        excess = self.level + amount - capacity * (1 + _SLACK)
        return max(0, math.ceil(excess / per_ms))


@dataclass(slots=True)
class _Account:
    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)
    num_inflight: int = 0
    num_queued: int = 0


@dataclass(slots=True)
class _Charge:
    """What one accepted request holds of its key's account."""

    key: _Key
    idempotency_key: str
    num_requests: int  # 0 where the rate has no limit
    num_tokens: int
    num_prompt_tokens: int
    is_queued: bool = True


class Quotas:
    """The accounts of keys, and the charges of requests that have not ended.

    ``busy_retry_ms`` is the Retry-After where only the end of another request helps.
    """

    def __init__(self, *, max_keys: int, busy_retry_ms: int) -> None:
        self._max_keys = max_keys
        self._busy_retry_ms = busy_retry_ms
        self._busy: dict[_Key, _Account] = {}
        self._idle: OrderedDict[_Key, _Account] = OrderedDict()  # the longest idle first
        self._charges: dict[str, _Charge] = {}
        self._replayable: set[tuple[str, str]] = set()  # (tenant, idempotency key) of charges

    def __len__(self) -> int:
        return len(self._busy) + len(self._idle)

    def admit(self, request: Request, quota: generation.Quota, now_ms: int) -> None:
        """Charge a request that is about to be submitted. Raises HeadwayError QUOTA_EXCEEDED, or
        INVALID_REQUEST where it could never be admitted; nothing is charged then."""
        if not _has_limits(quota) or _replay_key(request) in self._replayable:
            return
        key = (request.tenant, quota.key_id)
        account = self._busy.get(key) or self._idle.get(key) or self._open(key)
        _check_counts(account, quota, self._busy_retry_ms)
        _check_rates(account, request, quota, now_ms)
        charge = _Charge(
            key,
            request.idempotency_key,
            num_requests=1 if quota.requests_per_s else 0,
            num_tokens=request.num_tokens if quota.tokens_per_minute else 0,
            num_prompt_tokens=request.num_prompt_tokens,
        )
        account.requests.level += charge.num_requests
        account.tokens.level += charge.num_tokens
        account.num_inflight += 1
        account.num_queued += 1
        self._charges[request.request_id] = charge
        self._busy[key] = account
        self._idle.pop(key, None)
        if request.idempotency_key:
            self._replayable.add(_replay_key(request))

    def refused(self, request_id: str) -> None:
        """The core did not take it, or had it already: nothing is left of its charge."""
        charge = self._charges.get(request_id)
        if charge is not None:
            account = self._close(request_id, charge)
            account.requests.level = max(0.0, account.requests.level - charge.num_requests)
            account.tokens.level = max(0.0, account.tokens.level - charge.num_tokens)

    def granted(self, request_id: str) -> None:
        """It waits no more; said again with each lease."""
        charge = self._charges.get(request_id)
        if charge is not None and charge.is_queued:
            charge.is_queued = False
            self._busy[charge.key].num_queued -= 1

    def ended(self, request_id: str, num_generated_tokens: int) -> None:
        """It is over, and generated so much."""
        charge = self._charges.get(request_id)
        if charge is not None:
            account = self._close(request_id, charge)
            unused = charge.num_tokens - charge.num_prompt_tokens - num_generated_tokens
            account.tokens.level = max(0.0, account.tokens.level - max(0, unused))

    def _open(self, key: _Key) -> _Account:
        if len(self) >= self._max_keys:
            if not self._idle:
                raise _exceeded("too many keys have requests", self._busy_retry_ms)
            self._idle.popitem(last=False)
        account = self._idle[key] = _Account()
        return account

    def _close(self, request_id: str, charge: _Charge) -> _Account:
        del self._charges[request_id]
        self._replayable.discard((charge.key[0], charge.idempotency_key))
        account = self._busy[charge.key]
        account.num_inflight -= 1
        account.num_queued -= charge.is_queued
        if not account.num_inflight:
            self._idle[charge.key] = self._busy.pop(charge.key)
        return account


def _has_limits(quota: generation.Quota) -> bool:
    return bool(
        quota.requests_per_s or quota.tokens_per_minute or quota.max_inflight or quota.max_queued
    )


def _replay_key(request: Request) -> tuple[str, str]:
    return request.tenant, request.idempotency_key


def _check_counts(account: _Account, quota: generation.Quota, retry_ms: int) -> None:
    if quota.max_inflight and account.num_inflight >= quota.max_inflight:
        raise _exceeded(f"the key has {account.num_inflight} requests in flight", retry_ms)
    if quota.max_queued and account.num_queued >= quota.max_queued:
        raise _exceeded(f"the key has {account.num_queued} requests waiting", retry_ms)


def _check_rates(account: _Account, request: Request, quota: generation.Quota, now_ms: int) -> None:
    requests_per_ms = quota.requests_per_s / 1_000
    tokens_per_ms = quota.tokens_per_minute / 60_000
    wait_ms = 0
    if requests_per_ms:
        account.requests.leak(requests_per_ms, now_ms)
        wait_ms = account.requests.wait_ms(1, max(1.0, quota.requests_per_s), requests_per_ms)
    if tokens_per_ms:
        num_tokens = request.num_tokens
        if num_tokens > quota.tokens_per_minute:
            raise HeadwayError(
                Reason.INVALID_REQUEST,
                f"prompt and max_tokens are {num_tokens} tokens, the key has "
                f"{quota.tokens_per_minute} a minute",
                field="sampling.max_tokens",
            )
        account.tokens.leak(tokens_per_ms, now_ms)
        tokens_wait_ms = account.tokens.wait_ms(num_tokens, quota.tokens_per_minute, tokens_per_ms)
        wait_ms = max(wait_ms, tokens_wait_ms)
    if wait_ms:
        raise _exceeded("the key asks for more than its rate", wait_ms)


def _exceeded(message: str, retry_after_ms: int) -> HeadwayError:
    return HeadwayError(
        Reason.QUOTA_EXCEEDED, f"{message[0].upper()}{message[1:]}.", retry_after_ms=retry_after_ms
    )
