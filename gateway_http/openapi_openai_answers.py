"""What the OpenAI endpoints answer, as types: see ``openapi_answers``."""

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls"]


class OpenAIErrorBody(msgspec.Struct):
    """Why, in words and as a code; ``param`` names the field that is wrong."""

    message: str
    type: str
    code: str
    param: str | None


class OpenAIError(msgspec.Struct):
    """An error as OpenAI's SDKs read it."""

    error: OpenAIErrorBody


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
