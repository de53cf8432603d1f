"""Settings of the scheduler process: command line > SCHEDULER_* > TOML > default.

Here stands what decides how much waits and who goes next, nearly all of it the core's; what the
doors around it take is in ``door_settings.py``.
"""

import dataclasses
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.door_settings import DAY_MS, DoorSettings

Share = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(gt=0, le=1)]
Wait = Annotated[int, Field(ge=1, le=30 * DAY_MS)]
Weight = Annotated[float, Field(gt=0, le=1e6)]
Limit = Annotated[int, Field(ge=1, le=10_000_000)]


class SchedulerSettings(DoorSettings):
    """Every limit has a default that is safe on one machine."""

    model_config = SettingsConfigDict(env_prefix="SCHEDULER_")
    config_env: ClassVar[str] = "SCHEDULER_CONFIG"

    # --- bounds, clocks and books of accepted work
    max_queued_requests: int = Field(
        20_000, ge=1, le=10_000_000, description="Requests waiting, beyond it QUEUE_FULL."
    )
    max_queued_tokens: int = Field(
        200_000_000, ge=1, le=1 << 50, description="Tokens of waiting requests."
    )
    max_queued_bytes: int = Field(
        1 << 30, ge=1, le=1 << 50, description="Memory of waiting requests."
    )
    band_queue_shares: tuple[Part, ...] = Field(
        (1.0, 0.95, 0.9, 0.85),
        max_length=64,
        description="Part of these three up to which each band is let in, so that later ones leave "
        "room to earlier ones; the last holds for all later bands, none means all of it.",
    )
    max_inflight: int = Field(
        20_000, ge=1, le=10_000_000, description="Requests accepted and not ended."
    )
    max_inflight_per_tenant: int = Field(
        10_000, ge=1, le=10_000_000, description="The same for one tenant."
    )
    max_inflight_per_model: int = Field(
        20_000, ge=1, le=10_000_000, description="The same for one model."
    )
    max_executors: int = Field(
        4_096, ge=1, le=100_000, description="Executors known, and Attach calls at once."
    )
    max_known_models: int = Field(
        10_000, ge=1, le=1_000_000, description="Models remembered, with their cards."
    )
    max_finished_keys: int = Field(
        100_000, ge=1, le=100_000_000, description="Idempotency keys of ended requests remembered."
    )
    num_bands: int = Field(4, ge=1, le=64, description="Priority bands; 0 is served first.")
    executor_grace_ms: int = Field(
        1_000,
        ge=0,
        le=DAY_MS,
        description="A lost executor's leases wait so long for it before they go elsewhere.",
    )
    stall_timeout_ms: int = Field(
        60_000,
        ge=100,
        le=DAY_MS,
        description="An executor whose engine makes no step for so long, with leases and without a "
        "load, is cut and must start anew.",
    )
    orphan_grace_ms: int = Field(
        10_000,
        ge=0,
        le=DAY_MS,
        description="An executor without a scheduler goes on computing for so long.",
    )
    revoke_timeout_ms: int = Field(
        5_000, ge=10, le=DAY_MS, description="An unconfirmed revoke closes the session."
    )
    max_attempts: int = Field(
        3,
        ge=1,
        le=100,
        description="Executors that a request may lose; then it ends ATTEMPTS_EXHAUSTED.",
    )
    max_returns: int = Field(
        32,
        ge=0,
        le=10_000,
        description="How often executors may hand a request back unfinished; once more and it ends "
        "ATTEMPTS_EXHAUSTED.",
    )
    max_quota_keys: int = Field(
        100_000, ge=1, le=10_000_000, description="Keys whose quota is counted; idle ones go first."
    )
    max_groups: int = Field(
        10_000, ge=1, le=10_000_000, description="Groups whose ends are remembered."
    )
    max_group_ends: int = Field(
        10_000, ge=1, le=1_000_000, description="Ends remembered of one group; the oldest go first."
    )
    result_ttl_ms: int = Field(
        3_600_000, ge=1, le=30 * DAY_MS, description="How long results and keys are remembered."
    )
    retry_after_min_ms: int = Field(1_000, ge=1, le=DAY_MS, description="Least Retry-After.")
    retry_after_max_ms: int = Field(60_000, ge=1, le=DAY_MS, description="Largest Retry-After.")

    # --- who goes next
    warm_bonus: float = Field(
        10.0,
        ge=0,
        le=1e6,
        description="Points that a loaded model gives its requests; 0 is arrival order alone, "
        "without first places and drains.",
    )
    aging_equalization_ms: int = Field(
        30_000, ge=1, le=DAY_MS, description="Waiting worth exactly one warm_bonus."
    )
    band_min_shares: tuple[Share, ...] = Field(
        (0.0, 0.1, 0.05, 0.05),
        max_length=64,
        description="Least part of an executor's grants for each band while earlier ones wait for "
        "it too, together below 1; 0 for bands that are not listed.",
    )
    band_max_wait_ms: tuple[Wait, ...] = Field(
        (30_000, 60_000, 120_000, 240_000),
        max_length=64,
        description="A request older than its band's limit counts as of the first band, where age "
        "decides; the last holds for all later bands, none means no limit.",
    )
    tenant_weights: dict[str, Weight] = Field(
        {}, max_length=100_000, description="Share of a tenant beside others; 1 if not listed."
    )
    locality_quantum_tokens: int = Field(
        4_096, ge=0, le=1 << 40, description="Tokens that a cached prefix may jump ahead by."
    )
    locality_max_passes: int = Field(
        8,
        ge=0,
        le=1_000_000,
        description="How often cached prefixes may jump over the same request.",
    )
    output_token_weight: int = Field(
        2, ge=1, le=1_000, description="What a generated token costs a tenant, in prompt tokens."
    )
    max_fair_accounts: int = Field(
        100_000,
        ge=1,
        le=100_000_000,
        description="Accounts of tenants remembered, one for each band and model; those of who "
        "waits or runs always are.",
    )

    # --- models on executors
    model_hold_ms: int = Field(
        3_000, ge=0, le=DAY_MS, description="An idle model is kept for follow-ups for so long."
    )
    switch_time_share: float = Field(
        0.02, ge=0.001, le=1, description="Part of an executor's time for forced model switches."
    )
    model_limits: dict[str, Limit] = Field(
        {}, max_length=10_000, description="Most requests of a model that run at once."
    )
    load_timeout_ms: int = Field(
        600_000, ge=100, le=DAY_MS, description="A load that takes longer counts as failed."
    )
    load_backoff_ms: int = Field(
        1_000, ge=1, le=DAY_MS, description="Wait after a failed load, doubling each time."
    )
    load_backoff_max_ms: int = Field(
        60_000, ge=1, le=DAY_MS, description="Longest wait after a failed load."
    )
    max_load_failures: int = Field(
        3,
        ge=1,
        le=1_000,
        description="A model that every executor failed to load so many times in a row is refused "
        "until the next try.",
    )

    # --- hints, waits and decisions
    session_ttl_ms: int = Field(
        300_000, ge=1, le=30 * DAY_MS, description="Idle sessions are forgotten after so long."
    )
    max_sessions: int = Field(
        100_000, ge=1, le=100_000_000, description="Sessions whose executor is remembered."
    )
    max_prefix_blocks: int = Field(
        200_000, ge=1, le=100_000_000, description="Prompt blocks whose executors are remembered."
    )
    max_wait_samples: int = Field(
        10_000, ge=1, le=10_000_000, description="Queue waits remembered for percentiles."
    )
    has_decision_log: bool = Field(False, description="Log why each request went where it went.")

    @model_validator(mode="after")
    def _is_sensible(self) -> Self:
        if self.stall_timeout_ms < 2 * self.heartbeat_interval_ms:
            raise ValueError("stall_timeout_ms: at least twice heartbeat_interval_ms")
        if self.default_band >= self.num_bands:
            raise ValueError("default_band: must be below num_bands")
        if self.retry_after_max_ms < self.retry_after_min_ms:
            raise ValueError("retry_after_max_ms: must not be below retry_after_min_ms")
        if self.load_backoff_max_ms < self.load_backoff_ms:
            raise ValueError("load_backoff_max_ms: must not be below load_backoff_ms")
        if sum(self.band_min_shares) >= 1:
            raise ValueError("band_min_shares: must be below 1 together")
        return self

    def core(self) -> CoreSettings:
        """The part that the core reads."""
        names = [field.name for field in dataclasses.fields(CoreSettings)]
        return CoreSettings(**{name: getattr(self, name) for name in names})
