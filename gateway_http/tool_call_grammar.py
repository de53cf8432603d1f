"""Grammars of replies that call tools: one call that must come, or calls in place of an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway_http.http_errors import invalid
from gateway_http.openai_sampling import check_most, schema_grammar
from gateway_http.reply import ToolFormat
from gateway_http.settings import GatewaySettings
from gateway_http.tool_call_json import CALL_END, CALL_START
from gateway_http.tool_call_schema import (
    TEXT,
    kinds_of,
    one_call_schema,
    properties_of,
    texts_of,
    value_schema,
)
from gateway_http.tool_call_xml import FUNCTION_END, FUNCTION_START, VALUE_END, VALUE_START
from headway.v1.generation_pb2 import Choice, Grammar, Grammars, Repetition

Function = tuple[str, Mapping[str, Any] | None]  # its name and the schema of its parameters


class CallGrammars:
    """Of these tools, in a model's format. What cannot be had raises INVALID_REQUEST."""

    def __init__(
        self, form: ToolFormat, functions: Sequence[Function], settings: GatewaySettings
    ) -> None:
        self._form, self._functions, self._settings = form, functions, settings

    def one(self) -> Grammar:
        """One call, behind the mark that opens it."""
        if self._form == "qwen3_coder":
            return _any_of([self._xml_call(*one) for one in self._functions])
        key = "parameters" if self._form == "llama3" else "arguments"
        schema = msgspec.json.encode(one_call_schema(self._functions, key))
        return schema_grammar(schema, self._settings, "tools")

    def or_answer(self, answer: Grammar, *, is_parallel: bool) -> Grammar:
        """Calls with their marks, or this answer. Llama 3 has no marks, and one call."""
        if self._form == "llama3":
            return _any_of([answer, self.one()])
        line = _times(_text("\n"), 0, 1)
        call = _sequence(_text(f"{CALL_START}\n"), self.one(), _text(f"\n{CALL_END}"), line)
        return _any_of([answer, _times(call, 1, None if is_parallel else 1)])

    def _xml_call(self, name: str, parameters: Mapping[str, Any] | None) -> Grammar:
        values = []
        kinds = kinds_of(parameters)
        required = (parameters or {}).get("required")
        required = required if isinstance(required, list) else []
        num_bytes = 0
        for key, schema in properties_of(parameters).items():
            if set(key) & set("<>\n") or not key:
                named = f"{key[:100]!r} of {name}"
                raise invalid(f"This model's calls cannot have a parameter {named}.", "tools")
            ends = _text(f"\n{VALUE_END}\n")
            if TEXT not in kinds.get(key, [TEXT]):
                own = msgspec.json.encode(value_schema(parameters or {}, key))
                num_bytes += len(own)
                check_most("tools", num_bytes, self._settings.max_grammar_bytes)
                value = _sequence(schema_grammar(own, self._settings, "tools"), ends)
            elif texts_of(schema):
                value = _sequence(Grammar(choice=Choice(texts=texts_of(schema))), ends)
            else:
                value = _sequence(Grammar(text_until=VALUE_END), _text("\n"))
            value = _sequence(_text(f"{VALUE_START}{key}>\n"), value)
            values.append(value if key in required else _times(value, 0, 1))
        return _sequence(_text(f"{FUNCTION_START}{name}>\n"), *values, _text(FUNCTION_END))


def _text(text: str) -> Grammar:
    return Grammar(choice=Choice(texts=[text]))


def _sequence(*parts: Grammar) -> Grammar:
    return Grammar(sequence=Grammars(grammars=parts))


def _any_of(parts: Sequence[Grammar]) -> Grammar:
    return parts[0] if len(parts) == 1 else Grammar(any_of=Grammars(grammars=parts))


def _times(grammar: Grammar, least: int, most: int | None) -> Grammar:
    return Grammar(repetition=Repetition(grammar=grammar, min=least, max=most))
