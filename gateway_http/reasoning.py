"""Thoughts and answers: splits ``<think>...</think>`` off the beginning of a reply.

What is out after a text depends on the text alone, not on the pieces in which it came.
"""

from enum import Enum

from gateway_http.text import THINK_END, THINK_START


class _State(Enum):
    START = 1  # nothing but white space yet
    THOUGHT = 2
    GAP = 3  # the newlines between thought and answer
    ANSWER = 4


def num_open(text: str, marker: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``marker``."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


class ThoughtParser:
    """One reply; ``is_open``: the prompt has opened the thought already.

    A thought may only come first. The newlines around it belong to the format.
    """

    def __init__(self, is_open: bool) -> None:
        self._state = _State.THOUGHT if is_open else _State.START
        self._has_thought_text = False
        self._held = ""

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends within a thought."""
        return self._state is _State.THOUGHT

    def push(self, text: str) -> tuple[str, str]:
        """Thought and answer that are certain now; a thought comes before an answer."""
        if self._state is _State.ANSWER:
            return "", text
        thought, answer = "", ""
        self._held += text
        if self._state is _State.START:
            answer = self._start()
        if self._state is _State.THOUGHT:
            thought = self._think()
        if self._state is _State.GAP:
            answer = self._held.lstrip("\n")
            self._held = ""
            if answer:
                self._state = _State.ANSWER
        return thought, answer

    def finish(self) -> tuple[str, str]:
        """The rest, when the reply has ended."""
        rest, self._held = self._held, ""
        return (rest, "") if self._state is _State.THOUGHT else ("", rest)

    def _start(self) -> str:
        begun = self._held.lstrip()
        if begun.startswith(THINK_START):
            self._held = begun[len(THINK_START) :]
            self._state = _State.THOUGHT
        elif not THINK_START.startswith(begun):
            self._state = _State.ANSWER
            answer, self._held = self._held, ""
            return answer
        return ""

    def _think(self) -> str:
        if not self._has_thought_text:
            self._held = self._held.lstrip("\n")
            self._has_thought_text = bool(self._held)
        thought, end, rest = self._held.partition(THINK_END)
        if end:
            self._state = _State.GAP
            self._held = rest
            return thought.rstrip("\n")
        sure = self._held[: len(self._held) - num_open(self._held, THINK_END)].rstrip("\n")
        self._held = self._held[len(sure) :]
        return sure
