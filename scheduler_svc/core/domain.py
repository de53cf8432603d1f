"""What the core holds: settings, and the mutable records of requests, executors and leases."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """Every limit of the core; ``scheduler_svc.settings`` documents each for operators."""

    max_queued_requests: int = 20_000
    max_queued_tokens: int = 200_000_000
    max_queued_bytes: int = 1 << 30
    max_inflight: int = 20_000
    max_inflight_per_tenant: int = 10_000
    max_inflight_per_model: int = 20_000
    num_bands: int = 4
    executor_grace_ms: int = 10_000
    revoke_timeout_ms: int = 5_000
    max_attempts: int = 3
    result_ttl_ms: int = 3_600_000
    retry_after_min_ms: int = 1_000
    retry_after_max_ms: int = 60_000
