"""A chat's reply: what is thought, what is said, and which tools are called.

Which formats a model uses is seen from its chat template, unless a setting names them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from gateway_http.reasoning import ThoughtParser
from gateway_http.text import THINK_END, THINK_START
from gateway_http.tool_call_json import (
    CALL_END,
    CALL_START,
    CallArguments,
    CallReader,
    CallStart,
    Content,
)
from gateway_http.tool_call_xml import FUNCTION_START, XmlCallReader
from gateway_http.tool_calls import PYTHON_TAG, CallParser, Llama3Parser, MarkedParser

ToolFormat = Literal["none", "hermes", "llama3", "qwen3_coder"]
ReasoningFormat = Literal["none", "think"]

# Special tokens that a parser has to see; elsewhere they have no text.
SHOWN_TOKENS = (THINK_START, THINK_END, CALL_START, CALL_END, PYTHON_TAG)


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of a thought."""

    text: str


Piece = Thought | Content | CallStart | CallArguments


class ReplyFormat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to read one reply.

    ``is_thinking``: the prompt opened a thought. ``is_forced``: the reply is one call, and its
    opening mark is in the prompt. ``max_calls`` 0 is any number; calls above it are dropped.
    ``kinds``: the JSON types of arguments, by tool and name, where a format does not show them and
    they may be anything but text.
    """

    reasoning: ReasoningFormat = "none"
    tools: ToolFormat = "none"
    is_thinking: bool = False
    is_forced: bool = False
    max_calls: int = 0
    kinds: dict[str, dict[str, list[str]]] = {}

    @property
    def is_plain(self) -> bool:
        """All of the reply is content."""
        return self.reasoning == "none" and self.tools == "none"


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """What one model writes."""

    reasoning: ReasoningFormat
    tools: ToolFormat
    takes_thinking_switch: bool


def formats_of(
    model: str,
    template: str,
    reasoning_formats: Mapping[str, ReasoningFormat],
    tool_formats: Mapping[str, ToolFormat],
) -> ModelFormats:
    """From the template's marks; settings by the model's name come first."""
    has_thoughts = THINK_START in template and THINK_END in template
    reasoning: ReasoningFormat = "think" if has_thoughts else "none"
    tools: ToolFormat = "none"
    if "tools" in template:
        if CALL_START in template:
            tools = "qwen3_coder" if FUNCTION_START in template else "hermes"
        elif PYTHON_TAG in template or ("ipython" in template and '"parameters"' in template):
            tools = "llama3"
    return ModelFormats(
        reasoning_formats.get(model, reasoning),
        tool_formats.get(model, tools),
        "enable_thinking" in template,
    )


class ReplyParser:
    """One reply, from text to pieces. What is out after a text depends on the text alone."""

    def __init__(self, form: ReplyFormat) -> None:
        self._thoughts = None
        if form.reasoning == "think" and not form.is_forced:
            self._thoughts = ThoughtParser(form.is_thinking)
        self._calls: CallParser | None = None
        if form.tools == "hermes":
            self._calls = MarkedParser(CallReader, form.is_forced)
        elif form.tools == "qwen3_coder":
            self._calls = MarkedParser(partial(XmlCallReader, kinds=form.kinds), form.is_forced)
        elif form.tools == "llama3":
            self._calls = Llama3Parser()
        self._max_calls = form.max_calls
        self.num_calls = 0

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends within a thought."""
        return self._thoughts is not None and self._thoughts.is_thinking

    def push(self, text: str) -> list[Piece]:
        """What is certain now; neighbours of one kind are one piece."""
        pieces: list[Piece] = []
        if self._thoughts is not None:
            thought, text = self._thoughts.push(text)
            if thought:
                pieces.append(Thought(thought))
        if text:
            pieces += self._calls.push(text) if self._calls is not None else [Content(text)]
        return self._counted(pieces)

    def finish(self) -> list[Piece]:
        """The rest, when the reply has ended."""
        pieces: list[Piece] = []
        if self._thoughts is not None:
            thought, text = self._thoughts.finish()
            if thought:
                pieces.append(Thought(thought))
            if text:
                pieces += self._calls.push(text) if self._calls is not None else [Content(text)]
        if self._calls is not None:
            pieces += self._calls.finish()
        return self._counted(pieces)

    def _counted(self, pieces: list[Piece]) -> list[Piece]:
        taken: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, CallStart | CallArguments):
                if self._max_calls and piece.index >= self._max_calls:
                    continue
                self.num_calls = piece.index + 1
            taken.append(piece)
        return merged(taken)


def merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind become one."""
    if len(pieces) < 2:
        return pieces
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        match last, piece:
            case Thought(), Thought():
                out[-1] = Thought(last.text + piece.text)
            case Content(), Content():
                out[-1] = Content(last.text + piece.text)
            case CallArguments(), CallArguments() if last.index == piece.index:
                out[-1] = CallArguments(piece.index, last.text + piece.text)
            case _:
                out.append(piece)
    return out
