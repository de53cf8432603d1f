"""Grammars for tests, and what comes of them."""

import json
from typing import Any

from executor_svc.core.engine import (
    FinishReason,
    Grammar,
    GrammarKind,
    InvalidLeaseError,
    LeaseRequest,
    SamplingParams,
)
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.grammar import GrammarCompiler, GrammarLimits
from executor_svc.torch_engine.grammar_matcher import GrammarMatcher
from executor_svc.torch_engine.token_bytes import TokenBytes
from headway.reasons import Reason
from tests.engine.driving import Record, lease, run

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
    "$defs": {
        "inner": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "additionalProperties": False,
        }
    },
    "x-guidance": {"whitespace_pattern": ""},
}


def json_schema(schema: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, (json.dumps(schema),))


def regex(pattern: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, (pattern,))


def choice(*texts: str) -> Grammar:
    return Grammar(GrammarKind.CHOICE, texts)


JSON_OBJECT = Grammar(GrammarKind.JSON_OBJECT)


def params_for(grammar: Grammar, seed: int = 0, **fields: Any) -> SamplingParams:
    values: dict[str, Any] = {"max_tokens": 120, "seed": seed, "grammar": grammar}
    return SamplingParams(**values | fields)


def made_of(kind: GrammarKind, *parts: Grammar) -> Grammar:
    return Grammar(kind, parts=parts)


def times(grammar: Grammar, least: int, most: int | None) -> Grammar:
    return Grammar(GrammarKind.REPETITION, parts=(grammar,), times=(least, most))


def make_compiler(tokenizer_json: bytes, **limits: int) -> GrammarCompiler:
    return GrammarCompiler(
        tokenizer_json, vocab_size=320, eos_token_ids=(EOS,), limits=GrammarLimits(**limits)
    )


def complete_texts(record: Record, pieces: TokenBytes) -> dict[int, str]:
    """The text of each sequence that a stop token ended, without that."""
    return {
        end.key: b"".join(pieces[token] for token in record.tokens[end.key][:-1]).decode()
        for end in record.ends.values()
        if end.stop_token_id is not None
    }


def many_texts(
    engine: TorchEngine, grammar: Grammar, pieces: TokenBytes, count: int = 40, **fields: Any
) -> list[str]:
    """Complete texts of many seeds at temperature 1."""
    leases = [lease(seed, PROMPT, params_for(grammar, seed, **fields)) for seed in range(count)]
    record = run(engine, *leases)
    assert not record.failures
    for end in record.ends.values():
        assert end.stop_token_id is not None or end.reason is FinishReason.LENGTH
    return list(complete_texts(record, pieces).values())


def allowed_tokens(matcher: GrammarMatcher, token_ids: list[int]) -> set[int]:
    words = matcher.allowed(token_ids, 0, may_end=True)
    return {token for token in range(320) if words[token // 32] >> (token % 32) & 1}


def refusal_of(engine: TorchEngine, request: LeaseRequest) -> tuple[Reason, str]:
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
