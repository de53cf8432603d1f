"""The body of POST /v1/responses, as far as it can be honoured without keeping anything."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from gateway_http.http_errors import UnsupportedParameterError, invalid
from gateway_http.openai_chat_schema import (
    TEXT_KINDS,
    CalledFunction,
    ChatMessage,
    ContentPart,
    Function,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
)
from gateway_http.openai_messages import joined
from gateway_http.openai_schema import (
    ANY,
    COUNT,
    JsonSchemaFormat,
    ResponseFormat,
    Sampling,
    StreamOptions,
    raw_default,
)

LOGPROBS = "message.output_text.logprobs"
_HARMLESS: dict[str, Any] = {
    "user": ANY,
    "safety_identifier": ANY,
    "prompt_cache_key": ANY,
    "prompt_cache_retention": ANY,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "background": (False,),
    "truncation": ("disabled",),
}


class InputItem(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message, a call of an earlier turn, what it gave, or a thought."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""
    parsed_arguments: Any = None
    output: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    """What the text has to be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema: msgspec.Raw = raw_default(b"{}")
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    """About the text of the answer."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class FlatTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The one function to call."""

    type: Literal["function"]
    name: str


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """How much to think: not at all, or as the model does."""

    effort: Literal["none"] | None = None
    summary: None = None


class ResponsesRequest(Sampling, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/responses; nothing is stored, so nothing of earlier responses can be named."""

    harmless: ClassVar[dict[str, Any]] = _HARMLESS
    format_field: ClassVar[str] = "text.format"
    schema_field: ClassVar[str] = "text.format"

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: COUNT | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the text's tokens come with their logprobs."""
        for number, name in enumerate(self.include or ()):
            if name != LOGPROBS:
                raise UnsupportedParameterError(f"include[{number}]", f": {name[:100]!r}")
        return bool(self.include)

    @property
    def wanted_format(self) -> ResponseFormat | None:
        """In the words of chats."""
        form = self.text.format if self.text is not None else None
        if form is None:
            return None
        return ResponseFormat(form.type, JsonSchemaFormat(form.name, form.schema))

    def chat_tools(self) -> list[Tool]:
        """In the words of chats."""
        tools = []
        for one in self.tools or ():
            function = Function(one.name, one.description, one.parameters, one.strict)
            tools.append(Tool("function", function))
        return tools

    def chat_choice(self) -> str | NamedTool | None:
        """In the words of chats."""
        choice = self.tool_choice
        if isinstance(choice, FlatChoice):
            return NamedTool("function", NamedFunction(choice.name))
        return choice

    def messages(self) -> list[ChatMessage]:
        """Instructions and input in the words of chats. Raises INVALID_REQUEST by name."""
        messages = []
        if self.instructions is not None:
            messages.append(ChatMessage("system", self.instructions))
        if isinstance(self.input, str):
            return [*messages, ChatMessage("user", self.input)]
        thought = ""
        for number, item in enumerate(self.input):
            where = f"input[{number}]"
            if item.type == "reasoning":
                thought += _text(item.content or item.summary, f"{where}.content")
                continue
            if item.type == "function_call" and messages and messages[-1].role == "assistant":
                messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), _call(item, where)]
                continue
            message = _message(item, where)
            if message.role == "assistant" and thought:
                message.reasoning_content, thought = thought, ""
            messages.append(message)
        return messages


def _message(item: InputItem, where: str) -> ChatMessage:
    match item.type:
        case "message":
            if item.role is None:
                raise invalid("The message has no role.", f"{where}.role")
            return ChatMessage(item.role, _text(item.content, f"{where}.content"))
        case "function_call":
            return ChatMessage("assistant", tool_calls=[_call(item, where)])
        case "function_call_output":
            if item.output is None or item.call_id is None:
                raise invalid("An output names its call, and has a value.", where)
            output = _text(item.output, f"{where}.output")
            return ChatMessage("tool", output, tool_call_id=item.call_id)
    raise UnsupportedParameterError(f"{where}.type", f": {item.type[:50]!r}")


def _call(item: InputItem, where: str) -> ToolCall:
    if item.name is None or item.call_id is None:
        raise invalid("A call has a name and a call_id.", where)
    return ToolCall(CalledFunction(item.name, item.arguments), item.call_id)


def _text(content: str | list[ContentPart] | None, where: str) -> str:
    if content is None:
        raise invalid("This has no content.", where)
    return content if isinstance(content, str) else joined(content, where, TEXT_KINDS)
