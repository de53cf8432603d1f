"""Messages and tools as chat templates know them."""

from collections.abc import Sequence
from typing import Any

import msgspec

from gateway_http.http_errors import UnsupportedParameterError, invalid
from gateway_http.openai_chat_schema import ROLES, ChatMessage, ContentPart, Tool, ToolCall
from gateway_http.openai_sampling import check_json, check_most
from gateway_http.settings import GatewaySettings
from gateway_http.text import Message


def template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Each with its role, and its content as one string. Raises INVALID_REQUEST by name."""
    return [_message(f"messages[{number}]", one) for number, one in enumerate(messages)]


def template_tools(tools: Sequence[Tool], settings: GatewaySettings) -> list[dict[str, Any]]:
    """As Hugging Face's templates expect them; the model is not told of ``strict``."""
    described = []
    names = set()
    num_values = 0
    for number, tool in enumerate(tools):
        function: dict[str, Any] = {"name": tool.function.name}
        where = f"tools[{number}].function"
        if tool.function.name in names:
            raise invalid("Two tools have this name.", f"{where}.name")
        names.add(tool.function.name)
        if tool.function.description is not None:
            function["description"] = tool.function.description
        if tool.function.parameters is not None:
            num_values += check_json(tool.function.parameters, settings, f"{where}.parameters")
            check_most("tools", num_values, settings.max_schema_values)
            function["parameters"] = tool.function.parameters
        described.append({"type": "function", "function": function})
    return described


def _message(where: str, message: ChatMessage) -> Message:
    role = ROLES.get(message.role)
    if role is None:
        raise UnsupportedParameterError(f"{where}.role", f": {message.role[:50]!r}")
    plain: Message = {"role": role, "content": _content(where, message)}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_calls:
        _only("assistant", role, f"{where}.tool_calls")
        calls = enumerate(message.tool_calls)
        plain["tool_calls"] = [_call(f"{where}.tool_calls[{n}]", call) for n, call in calls]
    if message.reasoning_content is not None:
        _only("assistant", role, f"{where}.reasoning_content")
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_call_id is not None:
        _only("tool", role, f"{where}.tool_call_id")
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _content(where: str, message: ChatMessage) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None and message.role != "assistant":
        raise invalid("The message has no content.", f"{where}.content")
    return joined(content or (), f"{where}.content")


def joined(parts: Sequence[ContentPart], where: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of all parts. Raises INVALID_REQUEST if one is no text."""
    texts = []
    for place, part in enumerate(parts):
        if part.type not in kinds:
            raise UnsupportedParameterError(f"{where}[{place}].type", f": {part.type[:50]!r}")
        if part.text is None:
            raise invalid("The part has no text.", f"{where}[{place}].text")
        texts.append(part.text)
    return "".join(texts)


def _call(where: str, call: ToolCall) -> dict[str, Any]:
    """Templates write arguments as JSON themselves, so they get the value, not its text."""
    arguments = parsed_arguments(call.function.arguments, f"{where}.function.arguments")
    plain: dict[str, Any] = {"type": "function"}
    if call.id is not None:
        plain["id"] = call.id
    return {**plain, "function": {"name": call.function.name, "arguments": arguments}}


def parsed_arguments(text: str, where: str) -> dict[str, Any]:
    """The arguments of a call of an earlier turn; an empty text is none."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        raise invalid("The arguments are not valid JSON.", where) from None
    if not isinstance(arguments, dict):
        raise invalid("The arguments are no JSON object.", where)
    return arguments


def _only(expected: str, role: str, where: str) -> None:
    if role != expected:
        raise invalid(f"Only messages with the role {expected} have this.", where)
