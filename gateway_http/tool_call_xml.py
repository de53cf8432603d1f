"""One tool call as Qwen3-Coder writes it, told while it comes.

``<function=name><parameter=key>value</parameter>...</function>``: values have no quotes, so what
they are is as the tool's schema says. A text goes out while it comes, other values when they have
ended. A newline on either side of a value belongs to the format, and a value ends without its mark
where the next parameter begins, or the function ends.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from gateway_http.reasoning import num_open
from gateway_http.tool_call_json import CALL_END, SPACE, CallArguments, CallStart, Piece
from gateway_http.tool_call_schema import json_of

FUNCTION_START, FUNCTION_END = "<function=", "</function>"
VALUE_START, VALUE_END = "<parameter=", "</parameter>"
_VALUE_ENDS = (VALUE_END, VALUE_START, FUNCTION_END)
_MAX_NAME_CHARS = 256

ValueKinds = Mapping[str, Mapping[str, Sequence[str]]]


class _At(Enum):
    START = 1
    NAME = 2
    BODY = 3
    KEY = 4
    VALUE = 5
    DONE = 6
    BROKEN = 7


class XmlCallReader:
    """Reads one call. ``kinds``: by function and parameter, where a value may be no text.

    ``is_told``: the call was begun and cannot be taken back. ``raw`` is what was read before that.
    """

    def __init__(self, index: int, kinds: ValueKinds) -> None:
        self.raw = ""
        self.is_told = False
        self._at = _At.START
        self._index = index
        self._all_kinds = kinds
        self._held = ""
        self._name = ""
        self._num_values = 0
        self._kinds: Sequence[str] | None = None  # of the value at hand; None: it is text
        self._is_value_begun = False
        self._untold: list[Piece] = []

    @property
    def is_over(self) -> bool:
        """The call is complete, or none."""
        return self._at in (_At.DONE, _At.BROKEN)

    def read(self, text: str) -> str:
        """Read up to the end of the call; gives what stands behind it, read earlier or not."""
        if not self.is_told:
            self.raw += text
        self._held += text
        steps: dict[_At, Callable[[], bool]] = {
            _At.START: self._read_start,
            _At.NAME: self._read_name,
            _At.BODY: self._read_body,
            _At.KEY: self._read_key,
            _At.VALUE: self._read_value,
        }
        while not self.is_over and steps[self._at]():
            pass
        return self._held if self._at is _At.DONE else ""

    def take(self) -> list[Piece]:
        """What can be told now."""
        pieces, self._untold = self._untold, []
        return pieces

    def _read_start(self) -> bool:
        self._held = self._held.lstrip(SPACE)
        if self._held.startswith(FUNCTION_START):
            return self._go_behind(FUNCTION_START, _At.NAME)
        if not FUNCTION_START.startswith(self._held):
            self._at = _At.BROKEN
        return False

    def _read_name(self) -> bool:
        name = self._taken_name()
        if name:
            self._name = name
            self._at = _At.BODY
            self.is_told = True
            self._untold += [CallStart(self._index, name), CallArguments(self._index, "{")]
        elif name is not None:
            self._at = _At.BROKEN
        return bool(name)

    def _read_body(self) -> bool:
        self._held = self._held.lstrip(SPACE)
        if self._held.startswith(VALUE_START):
            return self._go_behind(VALUE_START, _At.KEY)
        if self._held.startswith((FUNCTION_END, CALL_END)):
            self._tell("}")
            self._held = self._held.removeprefix(FUNCTION_END)
            self._at = _At.DONE
            return True
        if any(mark.startswith(self._held) for mark in (VALUE_START, FUNCTION_END, CALL_END)):
            return False
        next_mark = self._held.find("<", 1)  # what comes before it has no meaning
        self._held = self._held[next_mark:] if next_mark > 0 else ""
        return True

    def _read_key(self) -> bool:
        key = self._taken_name()
        if key is None:
            return False
        comma = ", " if self._num_values else ""
        self._num_values += 1
        self._kinds = self._all_kinds.get(self._name, {}).get(key)
        quote = "" if self._kinds is not None else '"'
        self._tell(f"{comma}{json.dumps(key, ensure_ascii=False)}: {quote}")
        self._at, self._is_value_begun = _At.VALUE, False
        return True

    def _read_value(self) -> bool:
        if not self._is_value_begun and self._held:
            self._held = self._held.removeprefix("\n")
            self._is_value_begun = True
        found = [at for at in map(self._held.find, _VALUE_ENDS) if at >= 0]
        if found:
            value, self._held = self._held[: min(found)], self._held[min(found) :]
            value = value.removesuffix("\n")
            self._held = self._held.removeprefix(VALUE_END)
            quote = "" if self._kinds is not None else '"'
            self._tell(self._encoded(value) + quote)
            self._at = _At.BODY
            return True
        if self._kinds is None:
            num_held = max(num_open(self._held, mark) for mark in _VALUE_ENDS)
            sure = self._held[: len(self._held) - num_held].removesuffix("\n")
            self._held = self._held[len(sure) :]
            self._tell(self._encoded(sure))
        return False

    def _encoded(self, value: str) -> str:
        """JSON; of a text without its quotes."""
        if self._kinds is not None:
            return json_of(value, self._kinds)
        return json.dumps(value, ensure_ascii=False)[1:-1]

    def _taken_name(self) -> str | None:
        """A name up to its mark's end: None if that is not there yet, empty if it is no name."""
        name, end, rest = self._held.partition(">")
        if len(name) > _MAX_NAME_CHARS:
            return ""
        if not end:
            return None
        self._held = rest
        return name.strip()

    def _go_behind(self, mark: str, at: _At) -> bool:
        self._held = self._held[len(mark) :]
        self._at = at
        return True

    def _tell(self, text: str) -> None:
        if text:
            self._untold.append(CallArguments(self._index, text))
