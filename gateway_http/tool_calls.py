"""Tool calls in a reply's text, told while they come.

Calls between marks are any number between other text: JSON in Hermes' format (Qwen),
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, and XML in Qwen3-Coder's. Llama 3
calls by a reply that is ``{"name": ..., "parameters": {...}}``, perhaps behind
``<|python_tag|>``. What is out after a text depends on the text alone, not on the pieces in which
it came. What turns out to be no call is text like any other.
"""

from collections.abc import Callable
from typing import Protocol

from gateway_http.reasoning import num_open
from gateway_http.tool_call_json import CALL_END, CALL_START, SPACE, CallReader, Content, Piece

PYTHON_TAG = "<|python_tag|>"


class CallParser(Protocol):
    """One reply, in one format."""

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""

    def finish(self) -> list[Piece]:
        """The rest, when the reply has ended."""


class Reader(Protocol):
    """Reads one call, by its number among the reply's.

    ``is_told``: the call was begun and cannot be taken back. ``raw`` is what was read before that.
    """

    is_told: bool
    raw: str

    @property
    def is_over(self) -> bool:
        """The call is complete, or none."""

    def read(self, text: str) -> str:
        """Read up to the end of the call; gives what stands behind it, read earlier or not."""

    def take(self) -> list[Piece]:
        """What can be told now."""


class MarkedParser:
    """Calls between marks; ``is_forced``: the prompt has opened the first one already."""

    def __init__(self, make_reader: Callable[[int], Reader], is_forced: bool = False) -> None:
        self._make_reader = make_reader
        self._num_calls = 0
        self._call = make_reader(0) if is_forced else None
        self._is_closing = False
        self._is_after_call = False
        self._held = ""
        self._opening = ""  # what is text if the call at hand turns out to be none

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        self._held += text
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        rest, self._held = self._held, ""
        if self._call is not None:
            rest = "" if self._call.is_told else self._opening + self._call.raw
            self._call = None
        elif self._is_closing or (self._is_after_call and not rest.strip(SPACE)):
            rest = ""
        return [Content(rest)] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Go on with what is held; whether there is more to do."""
        if self._call is not None:
            return self._step_in_call(self._call, pieces)
        if self._is_closing:
            return self._step_to_close()
        return self._step_in_text(pieces)

    def _step_in_text(self, pieces: list[Piece]) -> bool:
        held = self._held
        if self._is_after_call:
            held = held.lstrip(SPACE)
            self._is_after_call = not held
        before, found, after = held.partition(CALL_START)
        if found:
            sure = before.rstrip(SPACE)
            self._opening = before[len(sure) :] + CALL_START
            self._call = self._make_reader(self._num_calls)
            self._held = after
        else:
            sure = held[: len(held) - num_open(held, CALL_START)].rstrip(SPACE)
            self._held = held[len(sure) :]
        if sure:
            pieces.append(Content(sure))
        return bool(found)

    def _step_in_call(self, call: Reader, pieces: list[Piece]) -> bool:
        if not self._held:
            return False
        self._held = call.read(self._held)
        pieces += call.take()
        if not call.is_over:
            return False
        self._call = None
        if call.is_told:
            self._num_calls += 1
            self._is_closing = True
        else:
            if self._opening:
                pieces.append(Content(self._opening))
            self._held = call.raw + self._held
        return True

    def _step_to_close(self) -> bool:
        """Behind a call: drop everything up to its end mark, or up to the next call."""
        end, start = self._held.find(CALL_END), self._held.find(CALL_START)
        if end >= 0 and (start < 0 or end < start):
            self._held = self._held[end + len(CALL_END) :]
        elif start >= 0:
            self._held = self._held[start:]
        else:
            keep = max(num_open(self._held, CALL_END), num_open(self._held, CALL_START))
            self._held = self._held[len(self._held) - keep :]
            return False
        self._is_closing = False
        self._is_after_call = True
        return True


class Llama3Parser:
    """A reply is calls from its beginning on, or no calls at all."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._call: CallReader | None = None
        self._is_text = False
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        if self._is_text:
            return [Content(text)] if text else []
        pieces: list[Piece] = []
        self._held += text
        while self._held and not self._is_text:
            if self._call is None:
                self._begin()
            if self._call is None:
                break
            self._go_on(self._call, pieces)
        if self._is_text and self._held:
            pieces.append(Content(self._held))
            self._held = ""
        return pieces

    def finish(self) -> list[Piece]:
        rest, self._held = self._held, ""
        if self._call is not None:
            rest = "" if self._call.is_told else self._call.raw
            self._call = None
        elif self._num_calls and not rest.strip(SPACE + ";,"):
            rest = ""
        return [Content(rest)] if rest else []

    def _begin(self) -> None:
        """A call, or text; nothing is decided while only space or half a mark is there."""
        ahead = self._held.lstrip(SPACE + (";," if self._num_calls else ""))
        body = ahead.removeprefix(PYTHON_TAG).lstrip(SPACE)
        if body.startswith("{"):
            self._call = CallReader(self._num_calls, needs_arguments=True)
        elif body and not PYTHON_TAG.startswith(ahead):
            self._is_text = True
            self._held = ahead if self._num_calls else self._held

    def _go_on(self, call: CallReader, pieces: list[Piece]) -> None:
        if call.is_at_start:
            start = self._held.index("{")
            call.raw = self._held[:start]
            self._held = self._held[start:]
        self._held = call.read(self._held)
        pieces += call.take()
        if call.is_over:
            self._call = None
            if call.is_told and call.is_whole:
                self._num_calls += 1
            else:
                self._is_text = True
                self._held = self._held if call.is_told else call.raw + self._held
