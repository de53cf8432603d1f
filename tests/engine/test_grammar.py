"""Structured output of a model that knows nothing: whatever it draws, the text fits."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from executor_svc.core.engine import Grammar, GrammarKind
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.token_bytes import TokenBytes
from tests.engine.grammars import (
    EOS,
    JSON_OBJECT,
    SCHEMA,
    allowed_tokens,
    choice,
    json_schema,
    made_of,
    make_compiler,
    many_texts,
    regex,
    times,
)


def test_json_texts_fit_their_schema(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    texts = many_texts(shared_engine, json_schema(SCHEMA), pieces)
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
    texts = many_texts(shared_engine, json_schema(schema), pieces, count=15)
    assert len(texts) > 8
    for text in texts:
        jsonschema_rs.validator_for(schema).validate(json.loads(text))


def test_json_objects(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    texts = many_texts(shared_engine, JSON_OBJECT, pieces, max_tokens=60)
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
    texts = many_texts(shared_engine, regex(pattern), pieces, count=20)
    assert len(texts) > 15
    assert all(re.fullmatch(pattern, text) for text in texts)


def test_choices(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    choices = ("yes", "no", "y", "no way", 'a "b" \\ /x/ \n\t\x01', "ünï🙂", "yes ")
    texts = many_texts(shared_engine, choice(*choices), pieces, count=120)
    assert len(texts) == 120
    assert set(texts) <= set(choices)
    assert len(set(texts)) >= 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6, unique=True))
def test_any_text_can_be_a_choice(qwen3: Path, choices: list[str]) -> None:
    """Each text leads through its automaton to where it may end, whatever characters it has."""
    tokenizer_json = (qwen3 / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    compiler = make_compiler(tokenizer_json)
    for text in choices:
        matcher = compiler.begin(choice(*choices), salt="", terminators={EOS}).matcher()
        # Where only one text is left, llguidance insists on the tokenizer's own tokens for it.
        tokens = tokenizer.encode(text).ids
        for length, token in enumerate([*tokens, EOS]):
            assert token in allowed_tokens(matcher, tokens[:length])


def test_white_space_between_values_is_bounded(tokenizer_json: bytes) -> None:
    """A weak model may love white space: where it is forced to, it comes to an end."""
    compiler = make_compiler(tokenizer_json)
    pieces = TokenBytes(tokenizer_json)
    for grammar in (JSON_OBJECT, json_schema({"type": "object"})):
        matcher = compiler.begin(grammar, salt="", terminators={EOS}).matcher()
        (opening,) = (token for token in range(256) if pieces[token] == b"{")
        spaces = {token for token in range(300) if pieces[token].isspace()}
        token_ids = [opening]
        while allowed := spaces & allowed_tokens(matcher, token_ids):
            token_ids.append(min(allowed))
            assert len(token_ids) < 20


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
    kinds = {
        json.loads(text)["kind"] for text in many_texts(shared_engine, json_schema(schema), pieces)
    }
    assert kinds == {"cat", "dog"}


def test_grammars_are_made_of_others(shared_engine: TorchEngine, pieces: TokenBytes) -> None:
    number = json_schema({"type": "integer", "minimum": 0, "maximum": 9})
    call = made_of(GrammarKind.SEQUENCE, choice('<f "\n'), number, choice("\n>"))
    whole = made_of(GrammarKind.ANY_OF, times(call, 1, 2), regex("[ab]{2}"), JSON_OBJECT)
    texts = many_texts(shared_engine, whole, pieces, count=60)
    kinds = [re.compile(one) for one in (r'(<f "\n\d\n>){1,2}', "[ab]{2}", r"(?s:\{.*\})")]
    matched = [[kind.fullmatch(text) is not None for kind in kinds] for text in texts]
    assert all(map(any, matched))
    assert all(map(any, zip(*matched, strict=True)))  # each of them was drawn


def test_text_up_to_a_mark(tokenizer_json: bytes) -> None:
    value = Grammar(GrammarKind.TEXT_UNTIL, ("\n</p>",))
    optional = times(choice("!"), 0, 1)
    grammar = made_of(GrammarKind.SEQUENCE, value, optional)
    tokenizer = Tokenizer.from_buffer(tokenizer_json)

    def fits(text: str) -> bool:
        compiler = make_compiler(tokenizer_json)
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
