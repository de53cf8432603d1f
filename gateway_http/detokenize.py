"""Tokens to text while they come: no character is split, no text depends on how tokens arrive.

Both classes take tokens one by one and are deterministic in them, so any way of cutting a stream
into chunks gives the same text, and a client that lost its connection can be continued from any
token on. Text is settled in windows: what was settled last stays as context, since some decoders
treat the first token of a text in a special way (after vLLM's detokenizer and ``DecodeStream``).
"""

from collections.abc import Callable, Collection, Mapping, Sequence

REPLACEMENT = "\ufffd"
MAX_UNSETTLED_TOKENS = 32
MAX_CHARACTER_TOKENS = 8


class Detokenizer:
    """The text of one sample. ``hidden_ids`` (special and end tokens) have none, unless ``shown``
    says how to write them.

    The last tokens of the prompt are its first context, so that a space at the beginning of the
    answer is not taken for the one that some tokenizers put before a whole text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        hidden_ids: Collection[int],
        prompt: Sequence[int] = (),
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self._decode = decode
        self._hidden_ids = hidden_ids
        self._shown = shown or {}
        tail = prompt[-MAX_CHARACTER_TOKENS:]
        self._window = [token_id for token_id in tail if token_id not in hidden_ids]
        text = decode(self._window)
        if text.endswith(REPLACEMENT):
            self._window, text = [], ""  # half a character belongs to nobody
        self._num_context = len(self._window)
        self._context_text = text

    def push(self, token_id: int) -> str:
        """Text that this token settles; empty while a character is incomplete."""
        if token_id in self._hidden_ids:
            name = self._shown.get(token_id)
            return self._cut() + name if name is not None else ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._settle(text, len(self._window))
        if len(self._window) - self._num_context < MAX_UNSETTLED_TOKENS:
            return ""
        # Not one long character but garbage: settle all that a further token cannot change.
        for split in range(len(self._window) - 1, len(self._window) - MAX_CHARACTER_TOKENS, -1):
            head = self._decode(self._window[:split])
            if head + self._decode(self._window[split:]) == text:
                return self._settle(head, split)
        return ""

    def flush(self) -> str:
        """The rest, when the sample has ended: an incomplete character becomes U+FFFD."""
        if len(self._window) == self._num_context:  # all is told: spares two decodings
            self._forget()
            return ""
        return self._settle(self._decode(self._window), len(self._window))

    def _cut(self) -> str:
        """The rest, before something that is no part of any character."""
        rest = self.flush()
        if self._context_text.endswith(REPLACEMENT):
            self._forget()
        return rest

    def _forget(self) -> None:
        self._window, self._num_context, self._context_text = [], 0, ""

    def _settle(self, text: str, num_settled: int) -> str:
        new_text = text[len(self._context_text) :]
        context = self._window[self._num_context : num_settled]
        self._window = self._window[self._num_context :]
        self._num_context = len(context)
        self._context_text = self._decode(context)
        return new_text


class StopTrimmer:
    """Cuts the stop string that ended a sample, holding back what may become one.

    The executor decides which stop counts; it says so with the token that completes it, so a
    match that is followed by another token was none (``min_tokens``) and is let go.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = tuple(stop_strings)
        self._held = ""

    def push(self, text: str) -> str:
        """Add one token's text; gives what is certain to be output."""
        if not self._stops:
            return text
        num_old = len(self._held)
        self._held += text
        keep = min(self._start(stop, num_old) for stop in self._stops)
        sure, self._held = self._held[:keep], self._held[keep:]
        return sure

    def finish(self, text: str, stop_string: str | None) -> str:
        """The last text of a sample, without the stop string that ended it."""
        rest = self._held + text
        self._held = ""
        if stop_string is not None:
            rest = rest.partition(stop_string)[0]
        return rest

    def _start(self, stop: str, num_old: int) -> int:
        """Where ``stop`` stands, completed by the new text, or may begin; else the end."""
        held = self._held
        whole = held.find(stop, max(0, num_old - len(stop) + 1))
        if whole >= 0:
            return whole
        start = held.find(stop[0], max(0, len(held) - len(stop) + 1))
        while start >= 0 and not stop.startswith(held[start:]):
            start = held.find(stop[0], start + 1)
        return start if start >= 0 else len(held)
