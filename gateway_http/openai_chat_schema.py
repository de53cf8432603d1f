"""The body of a chat: messages, tools, and what belongs to a template."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from gateway_http.openai_schema import ANY, COUNT, HARMLESS, Common

# As clients say, and as templates know them.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# Kinds of parts that are text; chats have the first one only.
TEXT_KINDS = ("text", "input_text", "output_text", "reasoning_text", "summary_text")
_NAME = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class ContentPart(msgspec.Struct):
    """One part of a message; only text is taken."""

    type: Annotated[str, Meta(extra_json_schema={"enum": list(TEXT_KINDS)})]
    text: str | None = None


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    """A call of an earlier turn; ``arguments`` is JSON text, which the SDK notes down parsed."""

    name: str
    arguments: str = ""
    parsed_arguments: Any = None


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """One call of an assistant's message; ``index`` is what streams add to it."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a chat. What an answer had in it, such as ``audio: null``, may come back, and
    so may what an SDK made of its content, ``parsed``.
    """

    role: Annotated[str, Meta(extra_json_schema={"enum": list(ROLES)})]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: list[None] | None = None
    parsed: Any = None


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """A tool as the model is told of it. ``strict`` holds for calls that tool_choice forces."""

    name: _NAME
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """Its name."""

    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Common, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    harmless: ClassVar[dict[str, Any]] = {**HARMLESS, "verbosity": ("medium",)}

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: COUNT | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none"] | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize, of a text or of a chat."""

    harmless: ClassVar[dict[str, Any]] = {"user": ANY}

    model: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    harmless: ClassVar[dict[str, Any]] = {"user": ANY}

    tokens: list[Annotated[int, Meta(ge=0, le=2**32 - 1)]]
    model: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
