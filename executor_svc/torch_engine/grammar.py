"""Structured output: which tokens may come next so that a text fits its grammar.

Rule: JSON Schemas, JSON objects, regular expressions, choices, and what is made of them go through
one door, the llguidance package (Earley parser over derivatives of regular expressions: no
back-tracking, no look-around, no references out of the schema). Its own limits bound what compiling
and each step may cost; ours bound the size of what comes in and of what is kept.

A stop token is not text: it may come exactly where the text is complete, and where nothing else
can come, it must. A place where nothing at all may come is a dead end, and ends the lease.

What may come next is a function of grammar and output alone. An automaton that was built for an
earlier sequence is only a shortcut: its lexer, which all its copies share, fills up with the states
that each of them visits, so where it comes to a limit a new one replays the output and decides.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from executor_svc.core.engine import Grammar, GrammarKind, InvalidLeaseError
from headway.reasons import Reason

if TYPE_CHECKING:
    from llguidance import LLMatcher

_WORD_BITS = 32
# A schema may say otherwise in its "x-guidance".
_JSON_OPTIONS: Any = {
    # A weak model would go on with white space until max_tokens.
    "whitespace_pattern": r"[ \n\t]{0,8}",
    # As anyOf, which is the same where a field tells the cases apart, as in pydantic's unions.
    "coerce_one_of": True,
}
_MAX_MESSAGE_CHARACTERS = 300
_NOTHING_FITS = "NoExtension"  # in llguidance's words
_DEAD_END = "grammar: a dead end, no token leads on to a complete text"
_TOO_SHORT = "grammar: the text is complete before it has min_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """What clients may ask for, and how much of it is kept. A senseless value raises ValueError."""

    max_grammar_bytes: int = 65_536  # of the source, or of all choices together
    max_regex_bytes: int = 2_048
    max_grammar_states: int = 10_000  # of the lexer, about 0.3 to 2 kB each
    max_cached_grammars: int = 64
    max_cached_grammar_bytes: int = 1 << 20  # of the sources

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


class GrammarCompiler:
    """Makes automata for one model.

    ``vocab_size`` is the model's; its tokenizer may know fewer tokens. Without llguidance the
    engine runs all the same, and refuses grammars.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        limits: GrammarLimits,
    ) -> None:
        self._limits, self._vocab_size = limits, vocab_size
        # By (salt, grammar), the one that was used last at the end.
        self._cache: OrderedDict[tuple[str, Grammar], LLMatcher] = OrderedDict()
        self._tokenizer: Any = None
        self._problem = ""
        try:
            from llguidance import LLTokenizer

            # Takes about a second for a vocabulary of 150,000, hence now and not in a step.
            self._tokenizer = LLTokenizer(
                tokenizer_json.decode().strip(),
                n_vocab=vocab_size,
                eos_token=list(eos_token_ids) or None,
            )
        except ImportError:
            self._problem = "grammars need the llguidance package, which this executor lacks"
        except ValueError as fault:
            self._problem = f"this model's tokenizer does not do for grammars: {_short(fault)}"

    def matcher(
        self, grammar: Grammar, *, salt: str, terminators: Collection[int]
    ) -> "GrammarMatcher":
        """An automaton for one sequence, which ``terminators`` end. Raises InvalidLeaseError.

        Grammars are cached for those of one ``salt`` only, so that nobody can find out by the time
        it takes what somebody else asks for.
        """
        if self._problem:
            raise _invalid(self._problem)
        if not terminators:
            raise _invalid("grammar: no token may end the text: ignore_eos without stop_token_ids")
        self._check_size(grammar)
        key = (salt, grammar)
        automaton = self._cache.get(key)
        if automaton is None:
            automaton = self._compile(grammar)
            if problem := automaton.get_error():
                raise _invalid(f"grammar: {_short(problem)}")
            self._cache[key] = automaton
            self._shrink_cache()
        else:
            self._cache.move_to_end(key)
        return GrammarMatcher(
            automaton.deep_copy(),
            lambda: self._compile_again(key),
            control_token_ids={*terminators, *self._tokenizer.eos_tokens},
            terminators=terminators,
            num_words=-(-self._vocab_size // _WORD_BITS),
        )

    @property
    def num_cached(self) -> int:
        return len(self._cache)

    def _compile(self, grammar: Grammar) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_lexer_states=self._limits.max_grammar_states, verbose_errors=False
        )
        return LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=limits)

    def _compile_again(self, key: tuple[str, Grammar]) -> "LLMatcher":
        """A new automaton, in place of one that came to its limits."""
        self._cache.pop(key, None)
        return self._compile(key[1])

    def _check_size(self, grammar: Grammar) -> None:
        size, limits = _num_bytes(grammar), self._limits
        if size > limits.max_grammar_bytes:
            raise _invalid(f"grammar: {size} bytes, at most {limits.max_grammar_bytes} are allowed")
        for node in grammar.nodes():
            if node.kind is GrammarKind.REGEX and _num_bytes(node) > limits.max_regex_bytes:
                raise _invalid(
                    f"grammar: a regular expression of {_num_bytes(node)} bytes, at most "
                    f"{limits.max_regex_bytes} are allowed"
                )

    def _shrink_cache(self) -> None:
        """Drop the oldest entries of whoever has most, so that nobody drives out the others'."""
        limits = self._limits
        while len(self._cache) > 1 and (
            len(self._cache) > limits.max_cached_grammars
            or sum(_num_bytes(grammar) for _, grammar in self._cache)
            > limits.max_cached_grammar_bytes
        ):
            bytes_of: dict[str, int] = {}
            for salt, grammar in self._cache:
                bytes_of[salt] = bytes_of.get(salt, 0) + _num_bytes(grammar) + 1
            greedy = max(bytes_of, key=bytes_of.__getitem__)
            del self._cache[next(key for key in self._cache if key[0] == greedy)]


class GrammarError(Exception):
    """A sequence cannot go on; the text is for the client."""


class GrammarMatcher:
    """The automaton of one sequence."""

    def __init__(
        self,
        automaton: "LLMatcher",
        compile_again: "Callable[[], LLMatcher]",
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
            problem = _short(self._automaton.get_error())
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


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises InvalidLeaseError."""
    from llguidance import LLMatcher

    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            _check_json_schema(grammar.sources[0])
            try:
                return LLMatcher.grammar_from_json_schema(grammar.sources[0], _JSON_OPTIONS)
            except ValueError as fault:  # its own parser is stricter in places
                raise _invalid(f"grammar: {_short(fault)}") from None
        case GrammarKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', _JSON_OPTIONS)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.sources[0])
        case GrammarKind.CHOICE:
            texts = " | ".join(map(_quoted, grammar.sources))
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
        case _:
            return _composed(grammar)


def _composed(grammar: Grammar) -> str:
    """One rule for all that is made of parts; schemas and expressions are grammars by names."""
    terminals: dict[str, str] = {}
    named: dict[Grammar, str] = {}
    rule = _rule(grammar, terminals, named)
    lines = [f"start: {rule}", *(f"{name}: {text}" for text, name in terminals.items())]
    grammars = [{"lark_grammar": "\n".join(lines)}]
    for part, name in named.items():
        (own,) = json.loads(_source(part))["grammars"]
        grammars.append({**own, "name": name})
    return json.dumps({"grammars": grammars})


def _rule(grammar: Grammar, terminals: dict[str, str], named: dict[Grammar, str]) -> str:
    """One grammar in a rule of llguidance's Lark dialect; fills in the names that it uses."""
    parts = [_rule(part, terminals, named) for part in grammar.parts]
    match grammar.kind:
        case GrammarKind.SEQUENCE:
            return f"({' '.join(parts)})"
        case GrammarKind.ANY_OF:
            return f"({' | '.join(parts)})"
        case GrammarKind.REPETITION:
            least, most = grammar.times
            return f"({parts[0]}){{{least},{'' if most is None else most}}}"
        case GrammarKind.CHOICE:
            text = " | ".join(map(_quoted, grammar.sources))
            return terminals.setdefault(text, f"TEXT{len(terminals)}")
        case GrammarKind.TEXT_UNTIL:
            # One token of the lexer, which is greedy: it ends where it cannot go on.
            text = f"/(?s:.*)/ {_quoted(grammar.sources[0])}"
            return terminals.setdefault(f"({text}) & ~({text} /(?s:.+)/)", f"TEXT{len(terminals)}")
        case _:
            return f"@{named.setdefault(grammar, f'part{len(named)}')}"


def _check_json_schema(text: str) -> None:
    """Refuse what is not one JSON value: llguidance pastes the text into a larger one."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise _invalid(f"grammar: a JSON Schema must be JSON: {_short(fault)}") from None
    if not isinstance(schema, dict | bool):
        raise _invalid("grammar: a JSON Schema must be an object or a boolean")


def _quoted(text: str) -> str:
    """A string of llguidance's Lark dialect: JSON's, but for a character that it does not take."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _num_bytes(grammar: Grammar) -> int:
    return sum(len(source.encode()) for node in grammar.nodes() for source in node.sources)


def _bits(token_ids: Collection[int], num_words: int) -> np.ndarray:
    bits = np.zeros(num_words * _WORD_BITS, dtype=bool)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _invalid(message: str) -> InvalidLeaseError:
    return InvalidLeaseError(Reason.INVALID_REQUEST, message)


def _short(problem: object) -> str:
    """A message of llguidance in one line, without the grammar that it may repeat."""
    lines = [line.strip() for line in str(problem).splitlines()] or ["unknown"]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines)[0][:_MAX_MESSAGE_CHARACTERS]
