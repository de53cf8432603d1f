"""What the endpoints answer, as types: for the OpenAPI document only, which is tested against them.

Fields that an answer may lack have a default; clients must expect fields that are not here.
"""

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls"]


class PlainError(msgspec.Struct):
    """An error outside of the APIs of others."""

    error: str
    code: str


class TinkerError(PlainError):
    """An error under /api/v1; ``detail`` repeats ``error`` for clients that read it there."""

    detail: str


class OpenAIErrorBody(msgspec.Struct):
    """Why, in words and as a code; ``param`` names the field that is wrong."""

    message: str
    type: str
    code: str
    param: str | None


class OpenAIError(msgspec.Struct):
    """An error as OpenAI's SDKs read it."""

    error: OpenAIErrorBody


class Health(msgspec.Struct):
    """Whether any executor is live."""

    status: Literal["ok", "unavailable"]


class Ready(msgspec.Struct):
    """Whether this gateway is connected, not shutting down, and has somebody to do the work."""

    is_ready: bool


class Usage(msgspec.Struct):
    """Tokens that were read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int] | None = None


class Timing(msgspec.Struct):
    """Where the time went, in seconds."""

    queue_s: float
    queue_place_s: float
    queue_model_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    num_attempts: int
    executor_id: str
    num_cached_tokens: int
    is_inexact: bool


class CalledFunction(msgspec.Struct):
    """``arguments`` is JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(msgspec.Struct):
    """What was said; null beside tool calls alone."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class TokenLogprob(msgspec.Struct):
    """A token, by its text and bytes."""

    token: str
    logprob: float | None
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """A token that was drawn, and the likeliest ones beside it."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry for each token."""

    content: list[ChosenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    """Parallel lists, with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None
    text_offset: list[int]


class ChatChoice(msgspec.Struct):
    """One sample of a chat."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct):
    """A chat's answer that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timing: Timing | None = None


class TextChoice(msgspec.Struct):
    """One sample of a completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class TextCompletion(msgspec.Struct):
    """A completion that is not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    timing: Timing | list[Timing] | None = None


class ResponseObject(msgspec.Struct):
    """An answer of /v1/responses that is not streamed."""

    id: str
    object: Literal["response"]
    created_at: int
    status: str
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float | None
    top_p: float | None
    top_logprobs: int
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    text: dict[str, Any]
    reasoning: dict[str, Any]
    previous_response_id: None
    store: Literal[False]
    background: Literal[False]
    truncation: str
    timing: Timing | None = None


class Model(msgspec.Struct):
    """A model that can be asked for now."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(msgspec.Struct):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokens(msgspec.Struct):
    """Token ids of a text or chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """The text of token ids."""

    prompt: str


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
