"""What a tool's arguments may be, and how they are read where a format has no quotes."""

import json
from typing import Any

import pytest

from gateway_http.tool_call_schema import json_of, kinds_of, texts_of, value_schema

ALL = ["array", "boolean", "integer", "null", "number", "object", "string"]


@pytest.mark.parametrize(
    ("schema", "kinds"),
    [
        ({"type": "string"}, None),
        ({"type": "integer"}, ["integer"]),
        ({"type": ["string", "null"]}, ["null", "string"]),
        ({"enum": ["a", 1, None, 1.5, True, [], {}]}, ALL),
        ({"enum": ["a", "b"]}, None),
        ({"const": 3}, ["integer"]),
        ({"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/t"}]}, ["integer", "string"]),
        ({"$ref": "#/$defs/a~1b%20c"}, ["boolean"]),
        ({"$ref": "#/$defs/none"}, ALL),
        ({"$ref": "#/properties/x"}, []),
        ({"oneOf": [{"$ref": "#/properties/x"}] * 9 + [{"type": "null"}]}, ["null"]),
        ({"type": 7}, ALL),
        ({}, ALL),
        (True, ALL),
    ],
)
def test_kinds(schema: Any, kinds: list[str] | None) -> None:
    definitions = {"t": {"type": "string"}, "a/b c": {"type": "boolean"}}
    found = kinds_of({"properties": {"x": schema}, "$defs": definitions})
    assert found == ({} if kinds is None else {"x": kinds})


def test_references_that_branch_cost_no_more_than_there_are() -> None:
    layers: dict[str, Any] = {
        f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 9} for n in range(30)
    }
    layers["l30"] = {"type": "null"}
    root = {"properties": {"x": {"$ref": "#/$defs/l0"}}, "$defs": layers}
    assert kinds_of(root) == {"x": ["null"]}


def test_parameters_without_names_have_no_kinds() -> None:
    nothing: list[Any] = [None, {}, {"properties": []}, {"properties": {}}]
    for parameters in nothing:
        assert kinds_of(parameters) == {}


@pytest.mark.parametrize(
    ("text", "kinds", "value"),
    [
        ("7", ["integer"], 7),
        (" 7\n", ["number"], 7),
        ("7", ["string", "null"], "7"),
        ("7", ["string", "number"], 7),
        ("True", ["boolean"], True),
        ("None", ["null", "string"], None),
        ("x", ["integer"], "x"),
        ('"x"', ["integer"], "x"),
        ('"x"', ["integer", "string"], '"x"'),
        ("1.5", ["integer"], 1.5),
        ("-Infinity", ["number"], "-Infinity"),
        ("[" * 99_999, ["array"], "[" * 99_999),
        ("", ["integer"], ""),
        ('{"a": [1]}', ["object"], {"a": [1]}),
    ],
)
def test_values_without_quotes(text: str, kinds: list[str], value: Any) -> None:
    assert json.loads(json_of(text, kinds)) == value


def test_a_schema_by_itself_takes_along_what_it_refers_to() -> None:
    definitions = {"t": {"enum": [1]}}
    root = {"properties": {"a": {"type": "null"}, "b": {"$ref": "#/$defs/t"}}, "$defs": definitions}
    assert value_schema(root, "a") == {"type": "null"}
    assert value_schema(root, "b")["$defs"]["tool"]["$defs"] == definitions


def test_listed_texts() -> None:
    assert texts_of({"enum": ["a", "b", "a"]}) == ["a", "b"]
    assert texts_of({"const": "a"}) == ["a"]
    for schema in ({"enum": ["a", 1]}, {"enum": [""]}, {"enum": "a"}, {}, True):
        assert texts_of(schema) == []
