"""When a sequence ends.

Rule: the token that completes a stop is the last one of its sequence and stays in the output;
tokens before number ``min_tokens`` end nothing. Stop strings are searched in bytes, so a
character or a stop that is split over several tokens is no special case, and each token costs
one look at the bytes that are new: the text so far is never scanned again.
"""

from dataclasses import dataclass

from executor_svc.core.engine import FinishReason, SequenceEnd


class StopMatcher:
    """Finds the first stop string to complete in a stream of byte pieces."""

    __slots__ = ("_keep", "_stops", "_tail")

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self._stops = [(text.encode(), text) for text in stop_strings]
        # A stop that completes in the next piece starts at most this many bytes before it.
        self._keep = max(len(stop) for stop, _ in self._stops) - 1
        self._tail = b""

    def feed(self, piece: bytes) -> str | None:
        """Take the next bytes; the stop string that completes first within them, if any."""
        old = len(self._tail)
        window = self._tail + piece
        best: tuple[int, str] | None = None
        for stop, text in self._stops:
            # Starting here, whatever is found ends in the new piece.
            at = window.find(stop, max(0, old - len(stop) + 1))
            if at >= 0 and (best is None or at + len(stop) < best[0]):
                best = (at + len(stop), text)
        self._tail = window[max(0, len(window) - self._keep) :]
        return None if best is None else best[1]


@dataclass(slots=True)
class StopRules:
    """What ends one sequence; ``stop_token_ids`` has the model's EOS ids too, where they count."""

    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    matcher: StopMatcher | None = None

    def check(self, key: int, index: int, token_id: int, piece: bytes) -> SequenceEnd | None:
        """Take token number ``index`` of sequence ``key``; its end, if this token is the last.

        Call once for each token, in order: the matcher remembers the bytes that it was shown.
        """
        text = self.matcher.feed(piece) if self.matcher is not None else None
        num_tokens = index + 1
        if index >= self.min_tokens:
            if token_id in self.stop_token_ids:
                return SequenceEnd(key, num_tokens, FinishReason.STOP, stop_token_id=token_id)
            if text is not None:
                return SequenceEnd(key, num_tokens, FinishReason.STOP, stop_string=text)
        if num_tokens >= self.max_tokens:
            return SequenceEnd(key, num_tokens, FinishReason.LENGTH)
        return None
