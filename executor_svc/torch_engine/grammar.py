"""Structured output: automata for grammars, made beside the engine and kept.

Rule: JSON Schemas, JSON objects, regular expressions, choices, and what is made of them go through
one door, the llguidance package (Earley parser over derivatives of regular expressions: no
back-tracking, no look-around, no references out of the schema). Its own limits bound what each step
may cost; ours bound the size of what comes in and of what is kept, and how long compiling may take
(``grammar_check.py``). Compiling runs beside the engine's thread, which goes on stepping.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from executor_svc.core.engine import Grammar, GrammarKind
from executor_svc.torch_engine.grammar_check import GrammarChecker, serve
from executor_svc.torch_engine.grammar_matcher import WORD_BITS, GrammarMatcher
from executor_svc.torch_engine.grammar_source import grammar_source, invalid, num_bytes, short

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Cost no more than their size. All others are tried first, see grammar_check.py.
_HARMLESS = (GrammarKind.JSON_OBJECT, GrammarKind.CHOICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """What clients may ask for, and how much of it is kept. A senseless value raises ValueError."""

    max_grammar_bytes: int = 65_536  # of the source, or of all choices together
    max_regex_bytes: int = 2_048
    max_grammar_states: int = 10_000  # of the lexer, about 0.3 to 2 kB each
    max_cached_grammars: int = 64
    max_cached_grammar_bytes: int = 1 << 20  # of the sources
    grammar_timeout_ms: int = 2_000  # of compiling one
    max_grammar_compile_bytes: int = 1 << 30  # address space of a process that compiles
    max_grammar_compilations: int = 2  # of one model, at a time

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


Key = tuple[str, Grammar]  # a tenant's salt with it


@dataclass(slots=True)
class _Job:
    """A compilation that leases wait for."""

    future: "Future[LLMatcher]"
    num_leases: int = 0


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
        self._cache: OrderedDict[Key, LLMatcher] = OrderedDict()  # by last use
        self._jobs: dict[Key, _Job] = {}
        self._threads = ThreadPoolExecutor(limits.max_grammar_compilations, "grammar")
        self._checkers: SimpleQueue[GrammarChecker] = SimpleQueue()  # those that are idle
        for _ in range(limits.max_grammar_compilations):
            self._checkers.put(
                GrammarChecker(limits.grammar_timeout_ms, limits.max_grammar_compile_bytes)
            )
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
            self._problem = f"this model's tokenizer does not do for grammars: {short(fault)}"

    def begin(self, grammar: Grammar, *, salt: str, terminators: Collection[int]) -> "Compilation":
        """Begin to make an automaton for texts that ``terminators`` end. Raises InvalidLeaseError.

        Grammars are cached for those of one ``salt`` only, so that nobody can find out by the time
        it takes what somebody else asks for.
        """
        if self._problem:
            raise invalid(self._problem)
        if not terminators:
            raise invalid("grammar: no token may end the text: ignore_eos without stop_token_ids")
        self._check_size(grammar)
        key = (salt, grammar)
        if key in self._cache:
            future: Future[LLMatcher] = Future()
            future.set_result(self._cache[key])
            return Compilation(self, key, future, terminators)
        job = self._jobs.get(key)
        if job is None:
            compile_one = self._compile if grammar.kind in _HARMLESS else self._check_and_compile
            job = self._jobs[key] = _Job(self._threads.submit(compile_one, grammar_source(grammar)))
        job.num_leases += 1
        return Compilation(self, key, job.future, terminators)

    def forget(self, key: Key) -> None:
        """One of the leases that a compilation was begun for does not want it any more."""
        job = self._jobs.get(key)
        if job is None:
            return
        job.num_leases -= 1
        if job.num_leases == 0:
            job.future.cancel()  # unless a thread has taken it up
            del self._jobs[key]

    def matcher(
        self, key: Key, future: "Future[LLMatcher]", terminators: Collection[int]
    ) -> "GrammarMatcher":
        """For one sequence, once its grammar is compiled. Raises InvalidLeaseError."""
        self._jobs.pop(key, None)
        automaton = self._cache.setdefault(key, future.result())
        self._cache.move_to_end(key)
        self._shrink_cache()
        return GrammarMatcher(
            automaton.deep_copy(),
            lambda: self._compile_again(key),
            control_token_ids={*terminators, *self._tokenizer.eos_tokens},
            terminators=terminators,
            num_words=-(-self._vocab_size // WORD_BITS),
        )

    @property
    def num_cached(self) -> int:
        return len(self._cache)

    def _check_and_compile(self, source: str) -> "LLMatcher":
        """An automaton for a grammar in llguidance's form. Raises InvalidLeaseError."""
        checker = self._checkers.get()
        try:
            problem = checker.problem(source, self._limits.max_grammar_states)
        finally:
            self._checkers.put(checker)
        if problem:
            raise invalid(f"grammar: {short(problem)}")
        return self._compile(source)

    def _compile(self, source: str) -> "LLMatcher":
        """The same without a check."""
        automaton = _automaton(self._tokenizer, source, self._limits.max_grammar_states)
        if problem := automaton.get_error():
            raise invalid(f"grammar: {short(problem)}")
        return automaton

    def _compile_again(self, key: Key) -> "LLMatcher":
        """A new automaton, in place of one that came to its limits."""
        self._cache.pop(key, None)
        return _automaton(self._tokenizer, grammar_source(key[1]), self._limits.max_grammar_states)

    def _check_size(self, grammar: Grammar) -> None:
        size, limits = num_bytes(grammar), self._limits
        if size > limits.max_grammar_bytes:
            raise invalid(f"grammar: {size} bytes, at most {limits.max_grammar_bytes} are allowed")
        for node in grammar.nodes():
            if node.kind is GrammarKind.REGEX and num_bytes(node) > limits.max_regex_bytes:
                raise invalid(
                    f"grammar: a regular expression of {num_bytes(node)} bytes, at most "
                    f"{limits.max_regex_bytes} are allowed"
                )

    def _shrink_cache(self) -> None:
        """Drop the oldest entries of whoever has most, so that nobody drives out the others'."""
        limits = self._limits
        while len(self._cache) > 1 and (
            len(self._cache) > limits.max_cached_grammars
            or sum(num_bytes(grammar) for _, grammar in self._cache)
            > limits.max_cached_grammar_bytes
        ):
            bytes_of: dict[str, int] = {}
            for salt, grammar in self._cache:
                bytes_of[salt] = bytes_of.get(salt, 0) + num_bytes(grammar) + 1
            greedy = max(bytes_of, key=bytes_of.__getitem__)
            del self._cache[next(key for key in self._cache if key[0] == greedy)]


class Compilation:
    """A lease's grammar that is being compiled; for the engine's thread."""

    def __init__(
        self,
        compiler: GrammarCompiler,
        key: Key,
        future: "Future[LLMatcher]",
        terminators: Collection[int],
    ) -> None:
        self._compiler, self._key, self._future = compiler, key, future
        self._terminators = terminators

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def wait(self, timeout_s: float) -> None:
        """Until it is done, or so long."""
        wait([self._future], timeout_s)

    def matcher(self) -> "GrammarMatcher":
        """For one sequence of the lease; waits until it is done. Raises InvalidLeaseError."""
        return self._compiler.matcher(self._key, self._future, self._terminators)

    def cancel(self) -> None:
        """The lease is gone."""
        self._compiler.forget(self._key)


def _automaton(tokenizer: Any, source: str, max_states: int) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=max_states, verbose_errors=False)
    return LLMatcher(tokenizer, source, log_level=0, limits=limits)


def _main() -> None:
    """What grammar_check.py starts. A tokenizer of bytes does, as compiling does not look at it."""
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")
    serve(lambda source, max_states: _automaton(tokenizer, source, max_states).get_error())


if __name__ == "__main__":
    _main()
