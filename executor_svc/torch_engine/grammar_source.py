"""Grammars in llguidance's own form, and its words in ours."""

import json
from typing import Any

from executor_svc.core.engine import Grammar, GrammarKind, InvalidLeaseError
from headway.reasons import Reason

# A schema may say otherwise in its "x-guidance".
_JSON_OPTIONS: Any = {
    # A weak model would go on with white space until max_tokens.
    "whitespace_pattern": r"[ \n\t]{0,8}",
    # As anyOf, which is the same where a field tells the cases apart, as in pydantic's unions.
    "coerce_one_of": True,
}
_MAX_MESSAGE_CHARACTERS = 300


def grammar_source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises InvalidLeaseError."""
    from llguidance import LLMatcher

    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            _check_json_schema(grammar.sources[0])
            try:
                return LLMatcher.grammar_from_json_schema(grammar.sources[0], _JSON_OPTIONS)
            except ValueError as fault:  # its own parser is stricter in places
                raise invalid(f"grammar: {short(fault)}") from None
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
        (own,) = json.loads(grammar_source(part))["grammars"]
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
        raise invalid(f"grammar: a JSON Schema must be JSON: {short(fault)}") from None
    if not isinstance(schema, dict | bool):
        raise invalid("grammar: a JSON Schema must be an object or a boolean")


def _quoted(text: str) -> str:
    """A string of llguidance's Lark dialect: JSON's, but for a character that it does not take."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def num_bytes(grammar: Grammar) -> int:
    return sum(len(source.encode()) for node in grammar.nodes() for source in node.sources)


def invalid(message: str) -> InvalidLeaseError:
    return InvalidLeaseError(Reason.INVALID_REQUEST, message)


def short(problem: object) -> str:
    """A message of llguidance in one line, without the grammar that it may repeat."""
    lines = [line.strip() for line in str(problem).splitlines()] or ["unknown"]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines)[0][:_MAX_MESSAGE_CHARACTERS]
