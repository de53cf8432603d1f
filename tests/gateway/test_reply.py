"""Thoughts and tool calls in a reply, however it is cut into pieces."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_http.reply import (
    Piece,
    ReplyFormat,
    ReplyParser,
    Thought,
    formats_of,
    merged,
)
from gateway_http.tool_call_json import CallArguments, CallStart, Content

HERMES = ReplyFormat(reasoning="think", tools="hermes")
LLAMA3 = ReplyFormat(tools="llama3")
CODER = ReplyFormat(
    reasoning="think",
    tools="qwen3_coder",
    kinds={"f": {"n": ["integer", "null"], "o": ["array", "object"], "m": ["null", "string"]}},
)
FORMATS = [
    HERMES,
    LLAMA3,
    ReplyFormat(reasoning="think", is_thinking=True),
    ReplyFormat(tools="hermes", is_forced=True),
    ReplyFormat(reasoning="think", tools="llama3"),
    CODER,
    ReplyFormat(tools="qwen3_coder", is_forced=True),
]


def parse(form: ReplyFormat, *texts: str) -> list[Piece]:
    parser = ReplyParser(form)
    pieces = [piece for text in texts for piece in parser.push(text)]
    return merged(pieces + parser.finish())


def read(form: ReplyFormat, text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Thought, content and calls of a whole reply."""
    thought = content = ""
    calls: list[list[str]] = []
    for piece in parse(form, text):
        match piece:
            case Thought():
                thought += piece.text
            case Content():
                content += piece.text
            case CallStart():
                assert piece.index == len(calls)
                calls.append([piece.name, ""])
            case CallArguments():
                calls[piece.index][1] += piece.text
    return thought, content, [(name, arguments) for name, arguments in calls]


def call(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


@pytest.mark.parametrize(
    ("text", "thought", "content"),
    [
        ("<think>\nwell\n</think>\n\nyes", "well", "yes"),
        ("\n<think>a\n\nb</think>c", "a\n\nb", "c"),
        ("<think>\n\n</think>\n\nyes", "", "yes"),
        ("<think>cut of", "cut of", ""),
        ("<think>half a </thi", "half a </thi", ""),
        ("no thought <think>x</think>", "", "no thought <think>x</think>"),
        ("<thin", "", "<thin"),
        ("  two spaces", "", "  two spaces"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("", "", ""),
    ],
)
def test_thoughts(text: str, thought: str, content: str) -> None:
    assert read(HERMES, text) == (thought, content, [])


def test_a_prompt_may_open_the_thought() -> None:
    form = ReplyFormat(reasoning="think", is_thinking=True)
    assert read(form, "so\n</think>\n\nyes") == ("so", "yes", [])
    assert read(form, "on and on") == ("on and on", "", [])


F = call("f", {"a": '}{"\\</tool_call>', "b": [1, {"c": None}]})
F_ARGUMENTS = json.dumps(json.loads(F)["arguments"])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<tool_call>\n{F}\n</tool_call>", "", [("f", F_ARGUMENTS)]),
        (f"Let me see. \n<tool_call>{F}</tool_call>", "Let me see.", [("f", F_ARGUMENTS)]),
        (
            f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{call('g', {})}\n</tool_call>\n",
            "",
            [("f", F_ARGUMENTS), ("g", "{}")],
        ),
        (f"<tool_call>{F}</tool_call> Done. ", "Done. ", [("f", F_ARGUMENTS)]),
        (f"<tool_call>{F}}}\n</tool_call>", "", [("f", F_ARGUMENTS)]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": null}', "", [("f", "{}")]),
        ('<tool_call>{"id": 7, "name": "f", "arguments": {}}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": "cu', "", [("f", '{"a": "cu')]),
        ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
        ('see <tool_call>{"name": 7}', 'see <tool_call>{"name": 7}', []),
        (f"<tool_call> <tool_call>{F}</tool_call>", "<tool_call>", [("f", F_ARGUMENTS)]),
        ("a < b, and <tool", "a < b, and <tool", []),
    ],
)
def test_calls_in_hermes_format(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(HERMES, text) == ("", content, calls)
    assert read(HERMES, f"<think>x\n</think>\n\n{text}") == ("x", content, calls)


def test_a_forced_call_begins_at_once() -> None:
    form = ReplyFormat(reasoning="think", tools="hermes", is_forced=True)
    assert read(form, F) == ("", "", [("f", F_ARGUMENTS)])
    assert read(form, "\n" + F + "\n</tool_call>") == ("", "", [("f", F_ARGUMENTS)])


G = call("g", {"x": 1}, "parameters")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (G, "", [("g", '{"x": 1}')]),
        (f"<|python_tag|>{G}", "", [("g", '{"x": 1}')]),
        (f" {G}; {G}", "", [("g", '{"x": 1}'), ("g", '{"x": 1}')]),
        (f"{G}\nand so on", "and so on", [("g", '{"x": 1}')]),
        ('{"name": "Ann", "age": 7}', '{"name": "Ann", "age": 7}', []),
        ('{"age": 7', '{"age": 7', []),
        (
            '{"type": "function", "name": "g", "parameters": {"x": 1}, "odd": 1}',
            "",
            [("g", '{"x": 1}')],
        ),
        ("[1]", "[1]", []),
        (f"I call {G}", f"I call {G}", []),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("<|py", "<|py", []),
    ],
)
def test_calls_in_llama_3_format(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(LLAMA3, text) == ("", content, calls)


def xml(name: str, **values: str) -> str:
    """A call as Qwen3-Coder writes it."""
    told = (f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{''.join(told)}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (xml("f", a="1"), "", [("f", {"a": "1"})]),
        (xml("f", a="1", n="1"), "", [("f", {"a": "1", "n": 1})]),
        (xml("g", a="1", n="1"), "", [("g", {"a": "1", "n": "1"})]),
        (xml("f"), "", [("f", {})]),
        (
            xml("f", n="None", m="null", o="[1,\n2]"),
            "",
            [("f", {"n": None, "m": None, "o": [1, 2]})],
        ),
        (xml("f", n="many", m="7", o="{"), "", [("f", {"n": "many", "m": "7", "o": "{"})]),
        (xml("f", n="NaN", m='"q"'), "", [("f", {"n": "NaN", "m": '"q"'})]),
        (
            xml("f", a='\n"x" \\ <b>ü</b>\n\n</par\n', b=""),
            "",
            [("f", {"a": '\n"x" \\ <b>ü</b>\n\n</par\n', "b": ""})],
        ),
        (f"I look.\n{xml('f')}\n{xml('g', a='x')}\n", "I look.", [("f", {}), ("g", {"a": "x"})]),
        ("<tool_call><function=f><parameter=a>x</parameter></function>", "", [("f", {"a": "x"})]),
        ("<tool_call>\n<function=f>\n<parameter=a>\nx\n</function>", "", [("f", {"a": "x"})]),
        (
            "<tool_call>\n<function=f>\n<parameter=a>\nx\n<parameter=b>\ny\n</function>",
            "",
            [("f", {"a": "x", "b": "y"})],
        ),
        ("<tool_call>\n<function=f>\nwell, <b>\n</tool_call> so", " so", [("f", {})]),
        (f"<tool_call>{F}</tool_call>", f"<tool_call>{F}</tool_call>", []),
        ("<tool_call>\n<function=\n>", "<tool_call>\n<function=\n>", []),
        ("<tool_call>\n<functio", "<tool_call>\n<functio", []),
        (f"<tool_call>\n<function={'x' * 300}>", f"<tool_call>\n<function={'x' * 300}>", []),
    ],
)
def test_calls_as_xml(text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    thought, said, found = read(CODER, f"<think>x</think>{text}")
    assert (thought, said.lstrip()) == ("x", content.lstrip())
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_a_text_of_a_call_goes_out_while_it_comes() -> None:
    parser = ReplyParser(CODER)
    begun = xml("f", a="all of this").removesuffix("this\n</parameter>\n</function>\n</tool_call>")
    assert parser.push(begun) == [CallStart(0, "f"), CallArguments(0, '{"a": "all of ')]
    assert parser.push("it") == [CallArguments(0, "it")]


def test_a_call_may_end_without_its_own_mark() -> None:
    text = "<tool_call><function=f>junk</tool_call>after"
    for chunks in ((*text,), (text,)):
        assert parse(CODER, *chunks)[-1] == Content("after")


def test_a_forced_call_as_xml() -> None:
    form = ReplyFormat(reasoning="think", tools="qwen3_coder", is_forced=True)
    text = xml("f", a="x").removeprefix("<tool_call>\n")
    assert read(form, text) == ("", "", [("f", '{"a": "x"}')])


def test_an_answer_in_json_is_not_held_as_if_it_were_a_call() -> None:
    parser = ReplyParser(LLAMA3)
    assert parser.push('{"name": "Ann", "ag') == []
    assert parser.push('e": 7, ') == [Content('{"name": "Ann", "age": 7, ')]
    assert parser.push('"b') == [Content('"b')]


def test_calls_above_the_limit_are_dropped() -> None:
    form = ReplyFormat(tools="hermes", max_calls=1)
    two = f"<tool_call>{F}</tool_call>" * 2
    parser = ReplyParser(form)
    parser.push(two)
    assert parser.num_calls == 1
    assert read(form, two) == ("", "", [("f", F_ARGUMENTS)])


FRAGMENTS = st.sampled_from(
    [
        *(
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<|python_tag|>",
            "</",
            "tool_call>",
        ),
        *("\n", " ", ";", "x", "<", "{", "}", '"', "\\", ",", ":", "[", "]", "1", "null", "}}"),
        *(F, G, '{"name": "f", "arguments": {', '{"name": "f", "parameters": "'),
        *('"name"', '"arguments"'),
        *("<function=", "f", ">", "<parameter=", "n", "</parameter>", "</function>", "\n\n"),
        *(xml("f", a="x\n", n="1"), "<tool_call>\n<function=f>", "<parameter=a>"),
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=14).map("".join)


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.sampled_from(FORMATS), st.data())
def test_pieces_do_not_depend_on_how_the_text_is_cut(
    text: str, form: ReplyFormat, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    bounds = [0, *cuts, len(text)]
    chunks = [text[start:end] for start, end in pairwise(bounds)]
    assert parse(form, *chunks) == parse(form, text)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from(FORMATS))
def test_what_is_out_after_a_text_does_not_depend_on_how_it_came(
    text: str, form: ReplyFormat
) -> None:
    """So that a stream can be continued from any token on."""
    slow = ReplyParser(form)
    told: list[Piece] = []
    for end in range(1, len(text) + 1):
        told = merged(told + slow.push(text[end - 1]))
        assert told == ReplyParser(form).push(text[:end])


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_nothing_is_lost_of_a_reply_without_calls_and_thoughts(text: str) -> None:
    for form in FORMATS[:2]:
        pieces = parse(form, text)
        if all(isinstance(piece, Content) for piece in pieces):
            said = "".join(piece.text for piece in pieces if isinstance(piece, Content))
            assert said == text or "<think>" in text


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.text(),
    st.booleans(),
)
def test_any_arguments_come_through(value: object, key: str, is_ascii: bool) -> None:
    arguments = json.dumps({key: value}, ensure_ascii=is_ascii)
    for form, text in (
        (HERMES, f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'),
        (LLAMA3, f'{{"name": "f", "parameters": {arguments}}}'),
    ):
        assert read(form, text) == ("", "", [("f", arguments)])


QWEN3 = "{% if tools %}<tool_call></tool_call>{% endif %}<think></think>{{ enable_thinking }}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN3, ("think", "hermes", True)),
        ("{% if tools %}<tool_call><function=x>{% endif %}", ("none", "qwen3_coder", False)),
        ("{% if tools %}<|python_tag|>{% endif %}", ("none", "llama3", False)),
        ('{% if tools %}ipython {"parameters": 1}{% endif %}', ("none", "llama3", False)),
        ("<tool_call>", ("none", "none", False)),
        ("", ("none", "none", False)),
    ],
)
def test_a_template_shows_what_its_model_writes(
    template: str, expected: tuple[str, str, bool]
) -> None:
    found = formats_of("m", template, {}, {})
    assert (found.reasoning, found.tools, found.takes_thinking_switch) == expected


def test_settings_come_before_the_template() -> None:
    found = formats_of("m", QWEN3, {"m": "none", "x": "think"}, {"m": "llama3"})
    assert (found.reasoning, found.tools) == ("none", "llama3")
