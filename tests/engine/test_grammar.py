"""Structured output of a model that knows nothing: whatever it draws, the text fits."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from executor_svc.core.engine import (
    FinishReason,
    Grammar,
    GrammarKind,
    InvalidLeaseError,
    LeaseRequest,
    SamplingParams,
)
from executor_svc.settings import BUILTIN_MODEL
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.grammar import GrammarCompiler, GrammarLimits
from executor_svc.torch_engine.grammar_check import GrammarChecker
from executor_svc.torch_engine.grammar_matcher import GrammarError, GrammarMatcher
from executor_svc.torch_engine.token_bytes import TokenBytes
from headway.reasons import Reason
from tests.engine.checkpoints import make_checkpoint
from tests.engine.driving import Record, build, lease, only, run

PROMPT = [10, 20, 30]
EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a", "bé", 3, None]},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": -20, "maximum": 300},
            "maxItems": 3,
        },
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "kind", "inner"],
    "additionalProperties": False,
    "$defs": {"inner": {"type": "object", "properties": {"ok": {"type": "boolean"}}}},
    "x-guidance": {"whitespace_pattern": ""},
}
SCHEMA["$defs"]["inner"]["additionalProperties"] = False  # type: ignore[index]


def _schema(schema: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, (json.dumps(schema),))


def _regex(pattern: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, (pattern,))


def _choice(*texts: str) -> Grammar:
    return Grammar(GrammarKind.CHOICE, texts)


JSON_OBJECT = Grammar(GrammarKind.JSON_OBJECT)


def _params(grammar: Grammar, seed: int = 0, **fields: Any) -> SamplingParams:
    values: dict[str, Any] = {"max_tokens": 120, "seed": seed, "grammar": grammar}
    return SamplingParams(**values | fields)


@pytest.fixture(scope="module")
def tokenizer_json(qwen3: Path) -> bytes:
    return (qwen3 / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def pieces(tokenizer_json: bytes) -> TokenBytes:
    return TokenBytes(tokenizer_json)


@pytest.fixture(scope="module")
def shared_engine(qwen3: Path) -> TorchEngine:
    return build(qwen3)


def _compiler(tokenizer_json: bytes, **limits: int) -> GrammarCompiler:
    return GrammarCompiler(
        tokenizer_json, vocab_size=320, eos_token_ids=(EOS,), limits=GrammarLimits(**limits)
    )


def _texts(record: Record, pieces: TokenBytes) -> dict[int, str]:
    """The text of each sequence that a stop token ended, without that."""
    return {
        end.key: b"".join(pieces[token] for token in record.tokens[end.key][:-1]).decode()
        for end in record.ends.values()
        if end.stop_token_id is not None
    }


def _many(
    engine: TorchEngine, grammar: Grammar, pieces: TokenBytes, count: int = 40, **fields: Any
) -> list[str]:
    """Complete texts of many seeds at temperature 1."""
    leases = [lease(seed, PROMPT, _params(grammar, seed, **fields)) for seed in range(count)]
    record = run(engine, *leases)
    assert not record.failures
    for end in record.ends.values():
        assert end.stop_token_id is not None or end.reason is FinishReason.LENGTH
    return list(_texts(record, pieces).values())


def test_json_texts_fit_their_schema(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    texts = _many(shared_engine, _schema(SCHEMA), pieces)
    validator = jsonschema_rs.validator_for(SCHEMA)
    assert len(texts) == 40
    assert len(set(texts)) > 30
    for text in texts:
        validator.validate(json.loads(text))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 7, "maximum": 12345},
        {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4},
        {"anyOf": [{"const": "x"}, {"type": "boolean"}, {"type": "null"}]},
        {"type": "string", "pattern": "^[a-f]{2,5}-[0-9]$"},
        {"type": "string", "format": "date"},
        {"type": "number", "minimum": 0, "maximum": 1},
    ],
    ids=str,
)
def test_kinds_of_schemas(
    shared_engine: TorchEngine, pieces: TokenBytes, schema: dict[str, Any]
) -> None:
    texts = _many(shared_engine, _schema(schema), pieces, count=15)
    assert len(texts) > 8
    for text in texts:
        jsonschema_rs.validator_for(schema).validate(json.loads(text))


def test_json_objects(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    texts = _many(shared_engine, JSON_OBJECT, pieces, max_tokens=60)
    assert len(texts) > 3
    assert all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-c]{2,4}x|yes",
        r"([0-9]{1,3}\.){3}[0-9]{1,3}",
        r"[A-Z][a-z]{0,5}(, [A-Z][a-z]{0,5}){0,2}\.",
        r"ü🙂?(日|本)+",
        r"a/b\n\"c\"",
        r"",
    ],
)
def test_regular_expressions_match_as_a_whole(
    shared_engine: TorchEngine, pieces: TokenBytes, pattern: str
) -> None:
    texts = _many(shared_engine, _regex(pattern), pieces, count=20)
    assert len(texts) > 15
    assert all(re.fullmatch(pattern, text) for text in texts)


def test_choices(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    choices = ("yes", "no", "y", "no way", 'a "b" \\ /x/ \n\t\x01', "ünï🙂", "yes ")
    texts = _many(shared_engine, _choice(*choices), pieces, count=120)
    assert len(texts) == 120
    assert set(texts) <= set(choices)
    assert len(set(texts)) >= 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6, unique=True))
def test_any_text_can_be_a_choice(qwen3: Path, choices: list[str]) -> None:
    """Each text leads through its automaton to where it may end, whatever characters it has."""
    tokenizer_json = (qwen3 / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    compiler = _compiler(tokenizer_json)
    for text in choices:
        matcher = compiler.begin(_choice(*choices), salt="", terminators={EOS}).matcher()
        # Where only one text is left, llguidance insists on the tokenizer's own tokens for it.
        tokens = tokenizer.encode(text).ids
        for length, token in enumerate([*tokens, EOS]):
            assert _is_in(matcher, tokens[:length], token)


def _is_in(matcher: GrammarMatcher, output: list[int], token: int) -> bool:
    mask = matcher.allowed(output, 0, may_end=True)
    return bool(mask[token // 32] >> (token % 32) & 1)


# --- ends -------------------------------------------------------------------------------------


def test_stop_tokens_end_complete_texts_only(
    shared_engine: TorchEngine, pieces: TokenBytes
) -> None:
    """A stop token that is an ordinary token is not text then; EOS counts no more if ignored."""
    stop = next(token for token in range(3, 259) if pieces[token] == b"c")
    grammar = _regex("[a-d]{3}")
    record = run(
        shared_engine,
        *(
            lease(seed, PROMPT, _params(grammar, seed, ignore_eos=True, stop_token_ids=(stop,)))
            for seed in range(20)
        ),
    )
    texts = _texts(record, pieces)
    assert len(texts) == 20
    assert all(re.fullmatch("[abd]{3}", text) for text in texts.values())
    assert {end.stop_token_id for end in record.ends.values()} == {stop}


def test_some_token_has_to_end_it(shared_engine: TorchEngine) -> None:
    with pytest.raises(InvalidLeaseError, match="no token may end") as caught:
        shared_engine.add(lease(0, PROMPT, _params(_regex("a"), ignore_eos=True)))
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert not shared_engine.has_work()


def test_min_tokens_delay_the_end(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    leases = [lease(i, PROMPT, _params(_regex("[ab]*"), i, min_tokens=30)) for i in range(10)]
    record = run(shared_engine, *leases)
    for end in record.ends.values():
        assert end.num_tokens > 30
    assert all(re.fullmatch("[ab]*", text) for text in _texts(record, pieces).values())


def test_a_text_that_is_complete_before_min_tokens_is_an_error(
    shared_engine: TorchEngine,
) -> None:
    short = lease(0, PROMPT, _params(_regex("abc"), min_tokens=5))
    record = run(shared_engine, short, lease(1, PROMPT, SamplingParams(max_tokens=9)))
    assert record.failures[0].reason is Reason.INVALID_REQUEST
    assert "min_tokens" in record.failures[0].message, "the client is told"
    assert record.ends.keys() == {1}


def test_stop_strings_end_a_text_anywhere(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    """Whoever gives one wants no more than what is before it."""
    grammar = _regex("[ab]{30}")
    record = run(shared_engine, lease(0, PROMPT, _params(grammar, stop_strings=("ab", "ba"))))
    text = b"".join(pieces[token] for token in record.tokens[0])
    assert record.ends[0].stop_string in ("ab", "ba")
    assert re.fullmatch("a+b|b+a", text.decode())


def test_length_may_cut_a_text(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    record = run(shared_engine, lease(0, PROMPT, _params(_regex("a{50}"), max_tokens=4)))
    assert record.ends[0].reason is FinishReason.LENGTH
    assert set(b"".join(pieces[token] for token in record.tokens[0])) == set(b"a")


@pytest.mark.parametrize(
    "grammar", [_regex(r"[^\s\S]"), _regex(r"ab[^\s\S]"), _schema({"$ref": "#"})]
)
def test_a_dead_end_ends_its_lease_only(shared_engine: TorchEngine, grammar: Grammar) -> None:
    whole = run(shared_engine, lease(1, PROMPT, SamplingParams(max_tokens=9, seed=4)))
    record = run(
        shared_engine,
        lease(0, PROMPT, _params(grammar)),
        lease(1, PROMPT, SamplingParams(max_tokens=9, seed=4)),
    )
    assert record.failures[0].reason is Reason.INVALID_REQUEST
    assert "dead end" in record.failures[0].message
    assert record.tokens[1] == whole.tokens[1]


# --- the same wherever it runs ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "fields"),
    [
        (_schema(SCHEMA), {}),
        (JSON_OBJECT, {"max_tokens": 40}),
        (_regex("([a-e]{1,3} ?){2,9}"), {"min_tokens": 6, "presence_penalty": 1.0}),
        (_choice("yes", "no", "no way"), {"temperature": 0.0}),
    ],
    ids=str,
)
def test_another_engine_goes_on_at_any_index(
    qwen3: Path, grammar: Grammar, fields: dict[str, Any]
) -> None:
    params = _params(grammar, 3, **fields)
    whole = run(build(qwen3), lease(0, PROMPT, params))
    tokens = whole.tokens[0]
    other = build(qwen3, max_num_seqs=4, max_num_batched_tokens=16, enable_prefix_caching=False)
    rest = run(
        other,
        *(lease(held, PROMPT, params, generated=(tokens[:held],)) for held in range(len(tokens))),
    )
    for held in range(len(tokens)):
        assert rest.tokens[held] == tokens[held:]
        assert rest.logprobs[held] == whole.logprobs[0][held:]
        assert rest.ends[held] == replace(whole.ends[0], key=held)


def test_samples_and_preemption(qwen3: Path, pieces: TokenBytes) -> None:
    params = _params(_schema(SCHEMA), 8)
    roomy = run(build(qwen3), lease(0, PROMPT, params, num_samples=5))
    tight_engine = build(qwen3, num_blocks=16, block_size=8)
    tight = run(tight_engine, lease(0, PROMPT, params, num_samples=5))
    assert only(tight_engine)._batcher.num_preemptions >= 1
    assert roomy.tokens == tight.tokens
    texts = _texts(roomy, pieces)
    assert len(set(texts.values())) > 1
    for text in texts.values():
        jsonschema_rs.validator_for(SCHEMA).validate(json.loads(text))


def test_plain_rows_do_not_notice(shared_engine: TorchEngine) -> None:
    plain = lease(0, PROMPT, SamplingParams(max_tokens=12, seed=2))
    alone = run(shared_engine, plain)
    among = run(shared_engine, lease(1, PROMPT, _params(_regex("[ab]*"))), plain)
    assert (among.tokens[0], among.logprobs[0]) == (alone.tokens[0], alone.logprobs[0])


def test_a_lexer_that_others_have_filled_does_not_matter() -> None:
    """Copies of an automaton share its lexer. Each text must get as far as it would alone.

    Only a vocabulary of some size leads a lexer to many states.
    """
    tokenizer_json = (BUILTIN_MODEL / "tokenizer.json").read_bytes()
    limits = GrammarLimits(max_grammar_states=1_500)
    grammar = _regex("(.*a.{0,30}b.*|.*c.{0,30}d.*|.*e.{0,30}f.*)x")
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
    others = [lease(i, PROMPT, _params(_regex("[a-c]{9}"), i)) for i in range(1, 4)]
    record = run(engine, lease(0, PROMPT, _params(_regex(pattern))), *others)
    assert record.failures.keys() == {0}
    assert record.failures[0].reason is Reason.INVALID_REQUEST
    assert "too many states" in record.failures[0].detail
    assert record.ends.keys() == {1, 2, 3}


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (_regex("(?=a)b"), "look-around"),
        (_regex(r"(a)\1"), "backreferences are not supported"),
        (_regex("(a"), "unclosed group"),
        (_regex("(" * 900 + ")" * 900), "grammar: "),
        (_regex("a" * 2_049), "2049 bytes, at most 2048"),
        (_choice("a" * 40_000, "b" * 40_000), "80000 bytes, at most 65536"),
        (Grammar(GrammarKind.JSON_SCHEMA, ("{",)), "must be JSON"),
        (Grammar(GrammarKind.JSON_SCHEMA, ('true}], "x": [{"a": 1',)), "must be JSON"),
        (Grammar(GrammarKind.JSON_SCHEMA, ("3",)), "object or a boolean"),
        (Grammar(GrammarKind.JSON_SCHEMA, ('{"items":' * 200 + "{}" + "}" * 200,)), "recursion"),
        (_schema({"type": "foo"}), "foo"),
        (_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (_schema({"allOf": [{"type": "integer"}, {"type": "string"}]}), "Unsatisfiable"),
        (_schema({"$ref": "https://example.com/x.json"}), "does not fetch"),
        (_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (_schema({"$id": "http://a/b", "properties": {"x": {"$ref": "c.json"}}}), "does not fetch"),
        (
            _schema(
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
    request = lease(0, PROMPT, _params(grammar), num_samples=2)
    reason, message = _refusal(shared_engine, request)
    assert reason is Reason.INVALID_REQUEST
    assert "grammar" in message
    assert said in message
    assert len(message) < 400


def _refusal(engine: TorchEngine, request: LeaseRequest) -> tuple[Reason, str]:
    """What a client is told, be it at once or when the grammar was looked at."""
    try:
        engine.add(request)
    except InvalidLeaseError as refusal:
        assert not engine.has_work()
        return refusal.reason, str(refusal)
    record = run(engine)
    assert not record.tokens
    failure = record.failures[request.key]
    return failure.reason, failure.message


def test_a_refused_lease_leaves_nothing(shared_engine: TorchEngine) -> None:
    held = ([5] * 120, ())
    request = lease(0, PROMPT, _params(_regex("(")), num_samples=2, generated=held)
    assert _refusal(shared_engine, request)[0] is Reason.INVALID_REQUEST
    assert not shared_engine.has_work()


# --- compiling beside the engine ----------------------------------------------------------------

HOSTILE = Grammar(GrammarKind.JSON_SCHEMA, ('{"type": "integer", "multipleOf": 9999991}',))


def test_a_hostile_schema_is_refused_and_holds_up_nobody(qwen3: Path) -> None:
    """It would take llguidance minutes."""
    engine = build(qwen3, grammar_limits=GrammarLimits(grammar_timeout_ms=300))
    good = lease(10, PROMPT, _params(_regex("[ab]{3}")))
    wanted = run(build(qwen3), good, lease(20, PROMPT))
    engine.add(lease(0, PROMPT, _params(HOSTILE)))
    engine.add(lease(20, PROMPT))
    record = Record()
    while 20 not in record.ends:  # else the hostile one would have to be waited for
        record.take(engine.step())
        assert not record.failures
    engine.add(good)
    while engine.has_work():
        record.take(engine.step())
    assert record.tokens == wanted.tokens
    assert record.failures.keys() == {0}
    assert record.failures[0].reason is Reason.INVALID_REQUEST
    assert "takes more than 300 ms" in record.failures[0].message
    # Whoever asks next gets a new process.
    assert _refusal(engine, lease(0, PROMPT, _params(HOSTILE)))[0] is Reason.INVALID_REQUEST
    assert run(engine, good).tokens == {10: wanted.tokens[10]}


def test_leases_that_go_while_their_grammar_is_compiled(qwen3: Path) -> None:
    engine = build(qwen3, grammar_limits=GrammarLimits(grammar_timeout_ms=200))
    for key in (0, 10):
        engine.add(lease(key, PROMPT, _params(HOSTILE)))
    engine.step()
    engine.abort(0)
    assert run(engine).failures.keys() == {10}
    for key in range(0, 50, 10):
        engine.add(lease(key, PROMPT, _params(HOSTILE), cache_salt=str(key)))
    for key in range(0, 50, 10):
        engine.abort(key)
    assert not engine.has_work()
    compiler = only(engine)._arrivals._grammars
    assert compiler is not None
    assert not compiler._jobs


def test_a_process_that_dies_is_replaced() -> None:
    checker = GrammarChecker(5_000, 1 << 30)
    assert checker.problem("start: /a+/", 1000) == ""
    assert checker._child is not None
    checker._child.kill()
    assert "too much memory" in checker.problem("start: /a+/", 1000)
    assert checker.problem("start: /a+/", 1000) == ""
    assert checker.problem("start: nothing", 1000) != ""
    checker.close()


def test_without_memory_nothing_is_compiled() -> None:
    """A process that has begun holds more than this already; a small grammar may fit into what it
    has and does not use, a large one cannot."""
    checker = GrammarChecker(60_000, 1 << 24)
    large = f'start: "{"a" * (1 << 23)}"'
    assert "too much memory" in checker.problem(large, 1000)
    checker.close()


def test_text_that_does_not_fit_cannot_be_continued(
    shared_engine: TorchEngine, pieces: TokenBytes
) -> None:
    """Only an executor that does not mask could have made it."""
    z = next(token for token in range(3, 259) if pieces[token] == b"z")
    record = run(shared_engine, lease(0, PROMPT, _params(_regex("[a-c]*")), generated=([z],)))
    assert record.failures[0].reason is Reason.INVALID_REQUEST


def test_without_a_tokenizer_grammars_are_refused(tmp_path: Path) -> None:
    engine = build(make_checkpoint(tmp_path, with_tokenizer=False))
    with pytest.raises(InvalidLeaseError, match="grammars need a tokenizer, tiny has none"):
        engine.add(lease(0, PROMPT, _params(JSON_OBJECT)))


def test_without_llguidance_the_engine_runs(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    engine = build(qwen3)
    with pytest.raises(InvalidLeaseError, match="llguidance package"):
        engine.add(lease(0, PROMPT, _params(JSON_OBJECT)))
    assert len(run(engine, lease(0, PROMPT)).tokens[0]) <= 8


def test_tokenizers_that_llguidance_cannot_read(tokenizer_json: bytes) -> None:
    odd = json.loads(tokenizer_json) | {"decoder": None}
    compiler = _compiler(json.dumps(odd).encode())
    with pytest.raises(InvalidLeaseError, match="tokenizer"):
        compiler.begin(JSON_OBJECT, salt="", terminators={EOS}).matcher()


@pytest.mark.parametrize("name", GrammarLimits.__slots__)
def test_senseless_limits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        GrammarLimits(**{name: 0})


# --- the cache ----------------------------------------------------------------------------------


def _compiled(monkeypatch: pytest.MonkeyPatch) -> list[Grammar]:
    """A list that names each grammar when it is compiled."""
    names: list[Grammar] = []
    compile_one: Any = GrammarCompiler._compile

    def watched(compiler: GrammarCompiler, grammar: Grammar) -> Any:
        names.append(grammar)
        return compile_one(compiler, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", watched)
    return names


def test_samples_and_requests_of_a_tenant_share_a_compilation(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = _compiled(monkeypatch)
    engine = build(qwen3)
    params = _params(_regex("[ab]{3}"))
    run(engine, lease(0, PROMPT, params, num_samples=4), lease(10, PROMPT, params))
    assert len(compiled) == 1
    run(engine, lease(0, PROMPT, params, cache_salt="somebody else"))
    assert len(compiled) == 2


def test_the_cache_is_bounded_and_fair(
    tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = _compiled(monkeypatch)
    compiler = _compiler(tokenizer_json, max_cached_grammars=4)

    def ask(salt: str, source: str) -> bool:
        """Whether it had to be compiled."""
        before = len(compiled)
        compiler.begin(_regex(source), salt=salt, terminators={EOS}).matcher()
        assert compiler.num_cached <= 4
        return len(compiled) > before

    assert ask("quiet", "q")
    assert all(ask("loud", "l" * i) for i in range(1, 9))
    assert not ask("quiet", "q")  # the loud one drove out its own
    assert not ask("loud", "l" * 8)
    assert ask("loud", "l" * 5)


def test_the_cache_is_bounded_in_bytes(
    tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = _compiled(monkeypatch)
    compiler = _compiler(tokenizer_json, max_cached_grammar_bytes=100)
    for source in ("a" * 60, "b" * 60, "c" * 300, "c" * 300):
        compiler.begin(_regex(source), salt="", terminators={EOS}).matcher()
        assert compiler.num_cached == 1  # one is kept, even if it is too large
    assert len(compiled) == 3


def test_white_space_between_values_is_bounded(tokenizer_json: bytes) -> None:
    """A weak model may love white space: where it is forced to, it comes to an end."""
    compiler = _compiler(tokenizer_json)
    pieces = TokenBytes(tokenizer_json)
    for grammar in (JSON_OBJECT, _schema({"type": "object"})):
        matcher = compiler.begin(grammar, salt="", terminators={EOS}).matcher()
        (opening,) = (token for token in range(256) if pieces[token] == b"{")
        spaces = {token for token in range(300) if pieces[token].isspace()}
        token_ids = [opening]
        while allowed := spaces & _allowed(matcher, token_ids):
            token_ids.append(min(allowed))
            assert len(token_ids) < 20


def _allowed(matcher: GrammarMatcher, token_ids: list[int]) -> set[int]:
    words = matcher.allowed(token_ids, 0, may_end=True)
    return {token for token in range(320) if words[token // 32] >> (token % 32) & 1}


def test_unions_that_a_field_tells_apart(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    """What pydantic makes of a discriminated union."""
    cases = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}},
            "required": ["kind"],
            "additionalProperties": False,
        }
        for kind in ("cat", "dog")
    ]
    schema = {"oneOf": cases, "discriminator": {"propertyName": "kind"}}
    kinds = {json.loads(text)["kind"] for text in _many(shared_engine, _schema(schema), pieces)}
    assert kinds == {"cat", "dog"}


def _parts(kind: GrammarKind, *parts: Grammar) -> Grammar:
    return Grammar(kind, parts=parts)


def _times(grammar: Grammar, least: int, most: int | None) -> Grammar:
    return Grammar(GrammarKind.REPETITION, parts=(grammar,), times=(least, most))


def test_grammars_are_made_of_others(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    number = _schema({"type": "integer", "minimum": 0, "maximum": 9})
    call = _parts(GrammarKind.SEQUENCE, _choice('<f "\n'), number, _choice("\n>"))
    whole = _parts(GrammarKind.ANY_OF, _times(call, 1, 2), _regex("[ab]{2}"), JSON_OBJECT)
    texts = _many(shared_engine, whole, pieces, count=60)
    kinds = [re.compile(one) for one in (r'(<f "\n\d\n>){1,2}', "[ab]{2}", r"(?s:\{.*\})")]
    matched = [[kind.fullmatch(text) is not None for kind in kinds] for text in texts]
    assert all(map(any, matched))
    assert all(map(any, zip(*matched, strict=True)))  # each of them was drawn


def test_text_up_to_a_mark(tokenizer_json: bytes) -> None:
    value = Grammar(GrammarKind.TEXT_UNTIL, ("\n</p>",))
    optional = _times(_choice("!"), 0, 1)
    grammar = _parts(GrammarKind.SEQUENCE, value, optional)
    tokenizer = Tokenizer.from_buffer(tokenizer_json)

    def fits(text: str) -> bool:
        compiler = _compiler(tokenizer_json)
        matcher = compiler.begin(grammar, salt="", terminators=(EOS,)).matcher()
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        for number, token_id in enumerate(token_ids):
            mask = matcher.allowed(token_ids[:number], 0, may_end=True)
            if not mask[token_id // 32] >> (token_id % 32) & 1:
                return False
        mask = matcher.allowed(token_ids, 0, may_end=True)
        return bool(mask[EOS // 32] >> (EOS % 32) & 1)

    assert fits("a </b>\n< ü </p>\n</p>")
    assert fits("\n</p>!")
    assert not fits("a")
    assert not fits("a\n</p>b")
    assert not fits("a\n</p>\n</p>")


def test_grammars_of_very_many_parts_come_to_a_limit(tokenizer_json: bytes) -> None:
    """Not to an end of the executor's time or memory."""
    nested = _choice("ab")
    for _ in range(14):
        nested = _times(nested, 0, 4_096)
    marks = (Grammar(GrammarKind.TEXT_UNTIL, (f"ab{number}",)) for number in range(2_000))
    token_ids = Tokenizer.from_buffer(tokenizer_json).encode("ab" * 30).ids

    def take_in(grammar: Grammar) -> None:
        matcher = _compiler(tokenizer_json).begin(grammar, salt="", terminators=(EOS,)).matcher()
        for number in range(len(token_ids)):
            matcher.allowed(token_ids[:number], 0, may_end=True)

    for grammar in (nested, _parts(GrammarKind.ANY_OF, *marks)):
        with pytest.raises((GrammarError, InvalidLeaseError)):
            take_in(grammar)
