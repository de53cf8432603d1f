"""One sequence on its way through its grammar: which tokens may come next.

A stop token is not text: it may come exactly where the text is complete, and where nothing else
can come, it must. A place where nothing at all may come is a dead end, and ends the lease.

What may come next is a function of grammar and output alone. An automaton that was built for an
earlier sequence is only a shortcut: its lexer, which all its copies share, fills up with the states
that each of them visits, so where it comes to a limit a new one replays the output and decides.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from executor_svc.torch_engine.grammar_source import short

WORD_BITS = 32
_NOTHING_FITS = "NoExtension"  # in llguidance's words
_DEAD_END = "grammar: a dead end, no token leads on to a complete text"
_TOO_SHORT = "grammar: the text is complete before it has min_tokens"


class GrammarError(Exception):
    """A sequence cannot go on; the text is for the client."""


class GrammarMatcher:
    """The automaton of one sequence."""

    def __init__(
        self,
        automaton: Any,  # an LLMatcher
        compile_again: Callable[[], Any],
        *,
        control_token_ids: Collection[int],
        terminators: Collection[int],
        num_words: int,
    ) -> None:
        self._automaton, self._compile_again = automaton, compile_again
        self._num_words, self._num_taken = num_words, 0
        self._is_text = ~_bits(control_token_ids, num_words)
        self._terminators = _bits(terminators, num_words)

    def allowed(
        self, token_ids: Sequence[int], num_prompt_tokens: int, *, may_end: bool
    ) -> np.ndarray:
        """The tokens that may come next: bit i of word w is token 32 w + i, uint32 [words].

        Call with a growing list of one sequence's tokens. ``may_end`` is False where min_tokens
        keeps stop tokens out. Raises GrammarError if nothing may come.
        """
        mask = self._advance(token_ids, num_prompt_tokens)
        if mask is None:  # by a limit of its own, or by what others have left: a new one decides
            self._automaton, self._num_taken = self._compile_again(), 0
            mask = self._advance(token_ids, num_prompt_tokens)
        if mask is None:
            problem = short(self._automaton.get_error())
            raise GrammarError(_DEAD_END if _NOTHING_FITS in problem else f"grammar: {problem}")
        mask &= self._is_text
        if may_end and self._automaton.is_accepting():
            mask |= self._terminators
        if not mask.any():
            raise GrammarError(_TOO_SHORT if self._automaton.is_accepting() else _DEAD_END)
        return mask

    def _advance(self, token_ids: Sequence[int], num_prompt_tokens: int) -> np.ndarray | None:
        """Take in what is new, and what llguidance allows then; None if it is in error."""
        new = token_ids[num_prompt_tokens + self._num_taken :]
        self._automaton.consume_tokens(list(new))
        self._num_taken += len(new)
        if self._automaton.is_error():
            return None
        mask = np.frombuffer(self._automaton.compute_bitmask(), dtype=np.uint32)
        return None if self._automaton.is_error() else mask[: self._num_words].copy()


def _bits(token_ids: Collection[int], num_words: int) -> np.ndarray:
    bits = np.zeros(num_words * WORD_BITS, dtype=bool)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)
