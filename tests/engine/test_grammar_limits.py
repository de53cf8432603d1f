"""What is refused of structured output, and limits that a grammar may come to."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from executor_svc.core.engine import Grammar, GrammarKind, InvalidLeaseError
from executor_svc.settings import BUILTIN_MODEL
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.grammar import GrammarCompiler, GrammarLimits
from executor_svc.torch_engine.grammar_matcher import GrammarError
from headway.reasons import Reason
from tests.engine.checkpoints import make_checkpoint
from tests.engine.driving import build, lease, run
from tests.engine.grammars import (
    EOS,
    JSON_OBJECT,
    PROMPT,
    choice,
    json_schema,
    made_of,
    make_compiler,
    params_for,
    refusal_of,
    regex,
    times,
)


def test_a_lexer_that_others_have_filled_does_not_matter() -> None:
    """Copies of an automaton share its lexer. Each text must get as far as it would alone.

    Only a vocabulary of some size leads a lexer to many states.
    """
    tokenizer_json = (BUILTIN_MODEL / "tokenizer.json").read_bytes()
    limits = GrammarLimits(max_grammar_states=1_500)
    grammar = regex("(.*a.{0,30}b.*|.*c.{0,30}d.*|.*e.{0,30}f.*)x")
    walks = [[67 + (7 * i * (walk + 1) + walk) % 26 for i in range(12)] for walk in range(8)]

    def reach(compiler: GrammarCompiler, walk: list[int]) -> tuple[int, str]:
        matcher = compiler.begin(grammar, salt="", terminators={EOS}).matcher()
        for length in range(len(walk) + 1):
            try:
                matcher.allowed(walk[:length], 0, may_end=True)
            except GrammarError as error:
                return length, str(error)
        return len(walk), ""

    def compiler() -> GrammarCompiler:
        return GrammarCompiler(tokenizer_json, vocab_size=4096, eos_token_ids=(EOS,), limits=limits)

    alone = [reach(compiler(), walk) for walk in walks]
    shared = compiler()
    assert [reach(shared, walk) for walk in walks] == alone
    assert {length for length, _ in alone} == {1, 3, 12}


def test_a_grammar_that_comes_to_its_limits_ends_its_lease_only(qwen3: Path) -> None:
    engine = build(qwen3, grammar_limits=GrammarLimits(max_grammar_states=60))
    pattern = "(.*a.{0,40}b.*|.*c.{0,40}d.*|.*e.{0,50}f.*)x"
    others = [lease(i, PROMPT, params_for(regex("[a-c]{9}"), i)) for i in range(1, 4)]
    record = run(engine, lease(0, PROMPT, params_for(regex(pattern))), *others)
    assert record.failures.keys() == {0}
    assert record.failures[0].reason is Reason.INVALID_REQUEST
    assert "too many states" in record.failures[0].detail
    assert record.ends.keys() == {1, 2, 3}


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (regex("(?=a)b"), "look-around"),
        (regex(r"(a)\1"), "backreferences are not supported"),
        (regex("(a"), "unclosed group"),
        (regex("(" * 900 + ")" * 900), "grammar: "),
        (regex("a" * 2_049), "2049 bytes, at most 2048"),
        (choice("a" * 40_000, "b" * 40_000), "80000 bytes, at most 65536"),
        (Grammar(GrammarKind.JSON_SCHEMA, ("{",)), "must be JSON"),
        (Grammar(GrammarKind.JSON_SCHEMA, ('true}], "x": [{"a": 1',)), "must be JSON"),
        (Grammar(GrammarKind.JSON_SCHEMA, ("3",)), "object or a boolean"),
        (Grammar(GrammarKind.JSON_SCHEMA, ('{"items":' * 200 + "{}" + "}" * 200,)), "recursion"),
        (json_schema({"type": "foo"}), "foo"),
        (json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (json_schema({"allOf": [{"type": "integer"}, {"type": "string"}]}), "Unsatisfiable"),
        (json_schema({"$ref": "https://example.com/x.json"}), "does not fetch"),
        (json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (
            json_schema({"$id": "http://a/b", "properties": {"x": {"$ref": "c.json"}}}),
            "does not fetch",
        ),
        (
            json_schema(
                {
                    "allOf": [
                        {"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]}
                        for i in range(8)
                    ]
                }
            ),
            "too large",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_grammars_that_cannot_be(shared_engine: TorchEngine, grammar: Grammar, said: str) -> None:
    request = lease(0, PROMPT, params_for(grammar), num_samples=2)
    reason, message = refusal_of(shared_engine, request)
    assert reason is Reason.INVALID_REQUEST
    assert "grammar" in message
    assert said in message
    assert len(message) < 400


def test_a_refused_lease_leaves_nothing(shared_engine: TorchEngine) -> None:
    held = ([5] * 120, ())
    request = lease(0, PROMPT, params_for(regex("(")), num_samples=2, generated=held)
    assert refusal_of(shared_engine, request)[0] is Reason.INVALID_REQUEST
    assert not shared_engine.has_work()


def test_without_a_tokenizer_grammars_are_refused(tmp_path: Path) -> None:
    engine = build(make_checkpoint(tmp_path, with_tokenizer=False))
    with pytest.raises(InvalidLeaseError, match="grammars need a tokenizer, tiny has none"):
        engine.add(lease(0, PROMPT, params_for(JSON_OBJECT)))


def test_without_llguidance_the_engine_runs(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    engine = build(qwen3)
    with pytest.raises(InvalidLeaseError, match="llguidance package"):
        engine.add(lease(0, PROMPT, params_for(JSON_OBJECT)))
    assert len(run(engine, lease(0, PROMPT)).tokens[0]) <= 8


def test_tokenizers_that_llguidance_cannot_read(tokenizer_json: bytes) -> None:
    odd = json.loads(tokenizer_json) | {"decoder": None}
    compiler = make_compiler(json.dumps(odd).encode())
    with pytest.raises(InvalidLeaseError, match="tokenizer"):
        compiler.begin(JSON_OBJECT, salt="", terminators={EOS}).matcher()


@pytest.mark.parametrize("name", GrammarLimits.__slots__)
def test_senseless_limits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        GrammarLimits(**{name: 0})


def test_grammars_of_very_many_parts_come_to_a_limit(tokenizer_json: bytes) -> None:
    """Not to an end of the executor's time or memory."""
    nested = choice("ab")
    for _ in range(14):
        nested = times(nested, 0, 4_096)
    marks = (Grammar(GrammarKind.TEXT_UNTIL, (f"ab{number}",)) for number in range(2_000))
    token_ids = Tokenizer.from_buffer(tokenizer_json).encode("ab" * 30).ids

    def take_in(grammar: Grammar) -> None:
        matcher = (
            make_compiler(tokenizer_json).begin(grammar, salt="", terminators=(EOS,)).matcher()
        )
        for number in range(len(token_ids)):
            matcher.allowed(token_ids[:number], 0, may_end=True)

    for grammar in (nested, made_of(GrammarKind.ANY_OF, *marks)):
        with pytest.raises((GrammarError, InvalidLeaseError)):
            take_in(grammar)
