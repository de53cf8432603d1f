"""Grammars are compiled beside the engine, in processes that can be killed, and kept."""

from pathlib import Path
from typing import Any

import pytest

from executor_svc.core.engine import Grammar, GrammarKind
from executor_svc.torch_engine.grammar import GrammarCompiler, GrammarLimits
from executor_svc.torch_engine.grammar_check import GrammarChecker
from headway.reasons import Reason
from tests.engine.driving import Record, build, lease, only, run
from tests.engine.grammars import EOS, PROMPT, make_compiler, params_for, refusal_of, regex

# It takes llguidance minutes.
HOSTILE = Grammar(GrammarKind.JSON_SCHEMA, ('{"type": "integer", "multipleOf": 9999991}',))


def test_a_hostile_schema_is_refused_and_holds_up_nobody(qwen3: Path) -> None:
    engine = build(qwen3, grammar_limits=GrammarLimits(grammar_timeout_ms=300))
    good = lease(10, PROMPT, params_for(regex("[ab]{3}")))
    wanted = run(build(qwen3), good, lease(20, PROMPT))
    engine.add(lease(0, PROMPT, params_for(HOSTILE)))
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
    assert refusal_of(engine, lease(0, PROMPT, params_for(HOSTILE)))[0] is Reason.INVALID_REQUEST
    assert run(engine, good).tokens == {10: wanted.tokens[10]}


def test_leases_that_go_while_their_grammar_is_compiled(qwen3: Path) -> None:
    engine = build(qwen3, grammar_limits=GrammarLimits(grammar_timeout_ms=200))
    for key in (0, 10):
        engine.add(lease(key, PROMPT, params_for(HOSTILE)))
    engine.step()
    engine.abort(0)
    assert run(engine).failures.keys() == {10}
    for key in range(0, 50, 10):
        engine.add(lease(key, PROMPT, params_for(HOSTILE), cache_salt=str(key)))
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
    params = params_for(regex("[ab]{3}"))
    run(engine, lease(0, PROMPT, params, num_samples=4), lease(10, PROMPT, params))
    assert len(compiled) == 1
    run(engine, lease(0, PROMPT, params, cache_salt="somebody else"))
    assert len(compiled) == 2


def test_the_cache_is_bounded_and_fair(
    tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = _compiled(monkeypatch)
    compiler = make_compiler(tokenizer_json, max_cached_grammars=4)

    def ask(salt: str, source: str) -> bool:
        """Whether it had to be compiled."""
        before = len(compiled)
        compiler.begin(regex(source), salt=salt, terminators={EOS}).matcher()
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
    compiler = make_compiler(tokenizer_json, max_cached_grammar_bytes=100)
    for source in ("a" * 60, "b" * 60, "c" * 300, "c" * 300):
        compiler.begin(regex(source), salt="", terminators={EOS}).matcher()
        assert compiler.num_cached == 1  # one is kept, even if it is too large
    assert len(compiled) == 3
