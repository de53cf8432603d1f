"""What the endpoints answer, as types: for the OpenAPI document only, which is tested against them.

Fields that an answer may lack have a default; clients must expect fields that are not here.
"""

from typing import Any, Literal

import msgspec


class PlainError(msgspec.Struct):
    """An error outside of the APIs of others."""

    error: str
    code: str


class TinkerError(PlainError):
    """An error under /api/v1; ``detail`` repeats ``error`` for clients that read it there."""

    detail: str


class Health(msgspec.Struct):
    """Whether any executor is live."""

    status: Literal["ok", "unavailable"]


class Ready(msgspec.Struct):
    """Whether a new request would be taken; if not, why."""

    is_ready: bool
    reason: Literal["gateway_draining", "no_scheduler", "scheduler_draining", "no_executor"] | None


class TinkerStatus(msgspec.Struct):
    """All is well."""

    status: str


class Typed(msgspec.Struct):
    """Nothing but what kind of answer it is."""

    type: str


class ClientConfig(msgspec.Struct):
    """Switches of the SDKs."""

    pjwt_auth_enabled: bool
    sample_max_concurrent_requests: int
    sample_use_retrieve_futures: bool
    sample_join_sampling_session: bool


class DynamicConfig(msgspec.Struct):
    """Switches that SDKs read again and again."""

    refresh_interval_sec: int
    sample_cancel_enabled: bool


class Token(msgspec.Struct):
    """Stands for an API key for a while."""

    jwt: str


class ServedModel(msgspec.Struct):
    """A model as Tinker describes it."""

    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool


class Capabilities(msgspec.Struct):
    """What can be sampled."""

    supported_models: list[ServedModel]


class Session(Typed):
    """A session; it is not kept."""

    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None


class SamplingSessionMade(Typed):
    """A signed name for a model."""

    sampling_session_id: str


class Joined(Typed):
    """The number of a clone."""

    client_counter: int


class Sampler(msgspec.Struct):
    """What a sampling session samples from."""

    sampler_id: str
    base_model: str


class Promise(msgspec.Struct):
    """An accepted sample, for retrieve_future."""

    request_id: str
    sample_sequence_ids: list[str]


class Pending(msgspec.Struct):
    """A future that is not ready; pollers of an SDK get the first four fields only."""

    request_id: str
    type: Literal["try_again", "pending"]
    queue_state: str
    queue_state_reason: str | None
    status: str = "queued"
    queue_position: int | None = None
    queue_depth: int | None = None
    estimated_wait_s: float | None = None
    progress: dict[str, int] | None = None
    retry_after_s: float | None = None


class Completions(msgspec.Struct):
    """Futures that have ended since a cursor."""

    completions: list[dict[str, Any]]
    cursor: int
