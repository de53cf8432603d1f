"""From a chat to its prompt: the template's variables, the tools, and how the reply will read.

A grammar binds a reply from its first token on, so a model that answers under one does not think
first: thinking is switched off in the template, or the thought that it opens is closed again. A
tool that must be called is such a grammar. Its call is begun for the model where the format has a
mark for that, so that the model goes on in its own way.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import msgspec

from gateway_http.client import LoadedModel
from gateway_http.http_errors import UnsupportedParameterError, invalid
from gateway_http.openai_chat_schema import ChatMessage, NamedTool, Tool
from gateway_http.openai_messages import template_messages, template_tools
from gateway_http.openai_sampling import check_most
from gateway_http.reply import (
    ModelFormats,
    ReasoningFormat,
    ReplyFormat,
    ToolFormat,
    formats_of,
)
from gateway_http.settings import GatewaySettings
from gateway_http.text import THINK_END, THINK_START, Chat, opens_thought
from gateway_http.tool_call_grammar import CallGrammars
from gateway_http.tool_call_json import CALL_START
from gateway_http.tool_call_schema import kinds_of
from headway.v1 import generation_pb2

_MAX_TEXT_CHARS = 1_024
_TYPES = {"bool": bool, "int": int, "float": float, "str": str}


class ChatWish(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint wants to be asked of a model. ``grammar``: the answer has to fit it."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Tool] = ()
    tool_choice: str | NamedTool | None = None
    is_parallel: bool = True
    kwargs: Mapping[str, Any] | None = None
    wants_no_thought: bool = False
    has_generation_prompt: bool | None = None
    continues_final_message: bool = False
    grammar: generation_pb2.Grammar | None = None


class ChatPrompt(msgspec.Struct, frozen=True):
    """What to ask, and how to read the reply."""

    token_ids: list[int]
    form: ReplyFormat
    grammar: generation_pb2.Grammar | None
    has_call_reason: bool


class Prompts:
    """Makes prompts of chats, for any model."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        reasoning = cast(dict[str, ReasoningFormat], _pairs(settings.reasoning_formats))
        tools = cast(dict[str, ToolFormat], _pairs(settings.tool_formats))
        formats = partial(formats_of, reasoning_formats=reasoning, tool_formats=tools)
        self._formats = lru_cache(maxsize=settings.max_cached_models)(formats)
        self._kwargs = dict(entry.split(":") for entry in settings.chat_template_kwargs)

    async def make(self, model: LoadedModel, wish: ChatWish) -> ChatPrompt:
        """Raises INVALID_REQUEST, by the name of what cannot be had."""
        check_most("messages", len(wish.messages), self._settings.max_messages)
        formats = self._formats(model.card.name, model.text.template_source)
        form = ReplyFormat(reasoning=formats.reasoning)
        chat = Chat(messages=template_messages(wish.messages), names=self._names(wish.kwargs))
        _continue(chat, wish)
        grammar = wish.grammar
        if not wish.tools and wish.tool_choice not in (None, "none", "auto"):
            raise invalid("There is no tool to choose.", "tool_choice")
        if wish.tools:
            form, forced = self._use_tools(chat, form, formats, wish)
            grammar = forced or grammar
        self._bind(chat, formats, grammar is not None, wish)
        text = await model.text.render_chat(chat, "messages")
        token_ids = await model.text.encode(text, "messages", False)
        is_thinking = formats.reasoning == "think" and _is_thinking(text, chat)
        form = msgspec.structs.replace(form, is_thinking=is_thinking)
        return ChatPrompt(token_ids, form, grammar, not isinstance(wish.tool_choice, NamedTool))

    def _use_tools(
        self, chat: Chat, form: ReplyFormat, formats: ModelFormats, wish: ChatWish
    ) -> tuple[ReplyFormat, generation_pb2.Grammar | None]:
        check_most("tools", len(wish.tools), self._settings.max_tools)
        chat.tools = template_tools(wish.tools, self._settings)
        if wish.tool_choice == "none":
            return form, None
        if formats.tools == "none":
            hint = ": this model's chat template shows no format for calls that is known here"
            raise UnsupportedParameterError("tools", hint)
        functions = [(one.function.name, one.function.parameters) for one in wish.tools]
        max_calls = 0 if wish.is_parallel else 1
        form = msgspec.structs.replace(form, tools=formats.tools, max_calls=max_calls)
        if formats.tools == "qwen3_coder":
            kinds = {name: kinds_of(parameters) for name, parameters in functions}
            told = {name: values for name, values in kinds.items() if values}
            form = msgspec.structs.replace(form, kinds=told)
        if wish.tool_choice in (None, "auto"):
            if wish.grammar is None:
                return form, None
            grammars = CallGrammars(formats.tools, functions, self._settings)
            return form, grammars.or_answer(wish.grammar, is_parallel=wish.is_parallel)
        if isinstance(wish.tool_choice, NamedTool):
            name = wish.tool_choice.function.name
            functions = [one for one in functions if one[0] == name]
            if not functions:
                raise invalid("There is no such tool.", "tool_choice.function.name")
        if formats.tools != "llama3":
            chat.answer_start = f"{CALL_START}\n"
            form = msgspec.structs.replace(form, is_forced=True)
        return form, CallGrammars(formats.tools, functions, self._settings).one()

    def _bind(self, chat: Chat, formats: ModelFormats, is_bound: bool, wish: ChatWish) -> None:
        """No thought before an answer that is bound, or where none is wanted."""
        chat.answers_at_once = is_bound or wish.wants_no_thought
        if not (chat.answers_at_once and formats.takes_thinking_switch):
            return
        if chat.names.get("enable_thinking") is True:
            message = "A reply that has to fit a format cannot begin with a thought."
            raise invalid(message, "chat_template_kwargs.enable_thinking")
        chat.names["enable_thinking"] = False

    def _names(self, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        names = {}
        for name, value in (kwargs or {}).items():
            where = f"chat_template_kwargs.{name[:100]}"
            kind = self._kwargs.get(name)
            if kind is None:
                raise UnsupportedParameterError(where)
            if type(value) is not _TYPES[kind] or len(str(value)) > _MAX_TEXT_CHARS:
                raise invalid(f"This must be of type {kind}.", where)
            names[name] = value
        return names


def _continue(chat: Chat, wish: ChatWish) -> None:
    """Whether the reply is a new message, or more of the last one."""
    continues = wish.continues_final_message
    if continues and wish.has_generation_prompt:
        message = "A final message that is continued has no generation prompt behind it."
        raise invalid(message, "add_generation_prompt")
    if continues and chat.messages[-1]["role"] != "assistant":
        raise invalid("Only a message of the assistant is continued.", "continue_final_message")
    chat.continues_final_message = continues
    chat.has_generation_prompt = not continues and wish.has_generation_prompt is not False


def _is_thinking(text: str, chat: Chat) -> bool:
    if not chat.continues_final_message:
        return opens_thought(text)
    content: str = chat.messages[-1]["content"]
    return content.rfind(THINK_START) > content.rfind(THINK_END)


def _pairs(entries: Sequence[str]) -> dict[str, str]:
    return {model: form for model, _, form in (entry.rpartition("=") for entry in entries)}
