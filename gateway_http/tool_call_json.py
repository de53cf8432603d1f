"""One tool call as JSON, read character by character, and told while it comes.

A call is told once its name is known and its arguments have begun: from there on it cannot be
taken back. Its arguments go out as the model wrote them.
"""

import json
from dataclasses import dataclass
from enum import Enum

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
SPACE = " \t\r\n"
_ARGUMENT_KEYS = ("arguments", "parameters")
_CALL_KEYS = ("name", *_ARGUMENT_KEYS, "type", "id", "function")  # some models write more than two


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Call number ``index`` begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Piece = Content | CallStart | CallArguments


class _At(Enum):
    START = 1
    KEY_OR_END = 2
    KEY = 3
    IN_KEY = 4
    COLON = 5
    VALUE = 6
    IN_VALUE = 7
    AFTER_VALUE = 8
    DONE = 9
    BROKEN = 10


class CallReader:
    """Reads one JSON object, character by character, as a call.

    ``needs_arguments``: an object without them, or with any odd key before them, is no call.
    ``is_told``: the call was begun and cannot be taken back. ``raw`` is what was read before that.
    """

    def __init__(self, index: int, *, needs_arguments: bool = False) -> None:
        self.raw = ""
        self.is_told = False
        self.at = _At.START
        self._index = index
        self._needs_arguments = needs_arguments
        self._key = ""
        self._value: list[str] = []  # the string, number or object at hand
        self._depth = 0
        self._is_string = False
        self._is_escaped = False
        self._name: str | None = None
        self._arguments: str | None = None  # not told yet; None: not begun
        self._streams_arguments = False

    def read(self, text: str) -> str:
        """Read up to the end of the object; gives what stands behind it."""
        rest = ""
        for number, char in enumerate(text, 1):
            self._read(char)
            if self.is_over:
                text, rest = text[:number], text[number:]
                break
        if not self.is_told:
            self.raw += text
        return rest

    def take(self) -> list[Piece]:
        """What can be told now."""
        if self._arguments is None and self.is_whole and not self._needs_arguments:
            self._arguments = "{}"
        if self._name is None or self._arguments is None:
            return []
        pieces: list[Piece] = []
        if not self.is_told:
            self.is_told = True
            pieces.append(CallStart(self._index, self._name))
        if self._arguments:
            pieces.append(CallArguments(self._index, self._arguments))
            self._arguments = ""
        return pieces

    @property
    def is_at_start(self) -> bool:
        """Nothing was read yet."""
        return self.at is _At.START and not self.raw

    @property
    def is_over(self) -> bool:
        """The object is complete, or none."""
        return self.at in (_At.DONE, _At.BROKEN)

    @property
    def is_whole(self) -> bool:
        """The object is complete."""
        return self.at is _At.DONE

    def _read(self, char: str) -> None:
        if self.at is _At.IN_VALUE:
            self._read_value(char)
        elif self.at is _At.IN_KEY:
            self._value.append(char)
            if self._ends_string(char):
                key = _loads("".join(self._value))
                self._key = key if isinstance(key, str) else ""
                self.at = _At.BROKEN if self._is_other_object() else _At.COLON
        elif char not in SPACE:
            self._read_structure(char)

    def _is_other_object(self) -> bool:
        """Whether a key shows that this is no call, so that an answer is not held to its end."""
        is_call = self._name is not None and self._arguments is not None
        return self._needs_arguments and not is_call and self._key not in _CALL_KEYS

    def _read_structure(self, char: str) -> None:
        match self.at, char:
            case _At.START, "{":
                self.at = _At.KEY_OR_END
            case ((_At.KEY_OR_END | _At.KEY), '"'):
                self._value, self.at = [char], _At.IN_KEY
            case ((_At.KEY_OR_END | _At.AFTER_VALUE), "}"):
                self.at = _At.DONE
            case _At.COLON, ":":
                self.at = _At.VALUE
            case _At.AFTER_VALUE, ",":
                self.at = _At.KEY
            case _At.VALUE, _:
                self._begin_value(char)
            case _:
                self.at = _At.BROKEN

    def _begin_value(self, char: str) -> None:
        if char not in '"{[-0123456789tfn':
            self.at = _At.BROKEN
            return
        self.at = _At.IN_VALUE
        self._value = []
        self._depth = 0
        self._is_string = False
        is_arguments = self._key in _ARGUMENT_KEYS and self._arguments is None
        self._streams_arguments = is_arguments and char == "{"
        if self._streams_arguments:
            self._arguments = ""
        self._read_value(char)

    def _read_value(self, char: str) -> None:
        if self._is_string:
            self._keep(char)
            if self._ends_string(char):
                self._is_string = False
                self._end_value_if_whole()
        elif char == '"':
            self._is_string = True
            self._keep(char)
        elif char in "{[":
            self._depth += 1
            self._keep(char)
        elif char in "}]" and self._depth:
            self._depth -= 1
            self._keep(char)
            self._end_value_if_whole()
        elif self._depth == 0 and char in SPACE + ",}":
            self._end_value()
            if self.at is _At.AFTER_VALUE and char not in SPACE:
                self._read_structure(char)
        else:
            self._keep(char)

    def _keep(self, char: str) -> None:
        if self._streams_arguments:
            assert self._arguments is not None
            self._arguments += char
        else:
            self._value.append(char)

    def _ends_string(self, char: str) -> bool:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        else:
            return char == '"'
        return False

    def _end_value_if_whole(self) -> None:
        if self._depth == 0:
            self._end_value()

    def _end_value(self) -> None:
        self.at = _At.AFTER_VALUE
        if self._streams_arguments:
            self._streams_arguments = False
            return
        text = "".join(self._value)
        value = _loads(text)
        if self._key == "name" and self._name is None:
            if isinstance(value, str) and value:
                self._name = value
            else:
                self.at = _At.BROKEN
        elif self._key in _ARGUMENT_KEYS and self._arguments is None:
            # Some models write the arguments as a string that holds JSON.
            self._arguments = value if isinstance(value, str) else text
            if value is None:
                self._arguments = "{}"


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
