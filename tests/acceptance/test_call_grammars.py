"""The grammars of calls: as the gateway makes them, the executor reads them, and texts fit them."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from bench.stack import ROOT
from executor_svc.torch_engine.grammar import GrammarCompiler, GrammarLimits
from executor_svc.translate_orders import decode_grammar
from gateway_http.reply import ReplyFormat, ReplyParser, ToolFormat
from gateway_http.settings import GatewaySettings
from gateway_http.tool_call_grammar import CallGrammars
from gateway_http.tool_call_json import CallArguments, CallStart
from gateway_http.tool_call_schema import kinds_of
from headway.v1 import generation_pb2

TOKENIZER = (ROOT / "executor_svc" / "builtin_model" / "tokenizer.json").read_bytes()
PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"$ref": "#/$defs/days"},
        "options": {"type": "object", "additionalProperties": {"type": "boolean"}},
    },
    "required": ["text", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
FUNCTIONS = [("weather", PARAMETERS), ("now", None)]
ARGUMENTS = {"text": "a\n<b>", "unit": "C", "days": 3, "options": {"x": True}}


def xml(name: str, **values: str) -> str:
    told = (f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<function={name}>\n{''.join(told)}</function>"


def json_call(name: str, key: str, arguments: Any) -> str:
    return json.dumps({"name": name, key: arguments})


WHOLE = {
    "hermes": json_call("weather", "arguments", ARGUMENTS),
    "llama3": json_call("weather", "parameters", ARGUMENTS),
    "qwen3_coder": xml("weather", text="a\n<b>", unit="C", days="3", options='{"x": true}'),
}
LEAST = {
    "hermes": json_call("weather", "arguments", {"text": "", "days": 1}),
    "llama3": json_call("weather", "parameters", {"text": "", "days": 1}),
    "qwen3_coder": xml("weather", text="", days="1"),
}
WRONG = {
    "hermes": [json_call("weather", "arguments", {"text": ""}), "{}", "weather"],
    "llama3": [json_call("weather", "parameters", {"text": "", "days": 0}), "now()"],
    "qwen3_coder": [
        xml("weather", text="x"),
        xml("weather", text="x", days="10"),
        xml("weather", text="x", unit="K", days="1"),
        xml("weather", days="1", text="x"),
        xml("then"),
        xml("now", x="1"),
    ],
}
FORMS: list[ToolFormat] = ["hermes", "llama3", "qwen3_coder"]


def fits(wire: generation_pb2.Grammar, text: str) -> bool:
    compiler = GrammarCompiler(
        TOKENIZER, vocab_size=4096, eos_token_ids=(0,), limits=GrammarLimits()
    )
    grammar = decode_grammar(wire)
    assert grammar is not None
    matcher = compiler.begin(grammar, salt="", terminators=(0,)).matcher()
    token_ids = Tokenizer.from_buffer(TOKENIZER).encode(text, add_special_tokens=False).ids
    for number, token_id in enumerate([*token_ids, 0]):
        mask = matcher.allowed(token_ids[:number], 0, may_end=True)
        if not mask[token_id // 32] >> (token_id % 32) & 1:
            return False
    return True


def calls(form: ToolFormat, text: str, *, is_forced: bool = False) -> list[tuple[str, Any]]:
    kinds = {name: kinds_of(parameters) for name, parameters in FUNCTIONS}
    parser = ReplyParser(ReplyFormat(tools=form, is_forced=is_forced, kinds=kinds))
    told: list[list[str]] = []
    for piece in parser.push(text) + parser.finish():
        if isinstance(piece, CallStart):
            told.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            told[piece.index][1] += piece.text
    return [(name, json.loads(arguments)) for name, arguments in told]


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_must_come(form: ToolFormat) -> None:
    wire = CallGrammars(form, FUNCTIONS, GatewaySettings()).one()
    is_forced = form != "llama3"
    assert fits(wire, WHOLE[form])
    assert calls(form, WHOLE[form], is_forced=is_forced) == [("weather", ARGUMENTS)]
    assert fits(wire, LEAST[form])
    assert calls(form, LEAST[form], is_forced=is_forced) == [("weather", {"text": "", "days": 1})]
    for wrong in WRONG[form]:
        assert not fits(wire, wrong), wrong


@pytest.mark.parametrize("form", FORMS)
def test_calls_or_an_answer(form: ToolFormat) -> None:
    answer = generation_pb2.Grammar(regex="[0-9]{3}")
    grammars = CallGrammars(form, FUNCTIONS, GatewaySettings())
    many, single = (grammars.or_answer(answer, is_parallel=one) for one in (True, False))
    call = WHOLE[form]
    if form != "llama3":
        call = f"<tool_call>\n{call}\n</tool_call>"
        assert fits(many, f"{call}\n{call}")
        assert not fits(single, f"{call}\n{call}")
        assert len(calls(form, f"{call}\n{call}")) == 2
    for wire in (many, single):
        assert fits(wire, call)
        assert fits(wire, "123")
        assert not fits(wire, "I call")
        assert not fits(wire, f"123{call}")
    assert calls(form, call) == [("weather", ARGUMENTS)]
