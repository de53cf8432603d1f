"""What the arguments of tools may be, from their JSON Schemas."""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

TEXT = "string"
_ALL_KINDS = ("string", "integer", "number", "boolean", "null", "array", "object")

Parameters = Mapping[str, Any]


def one_call_schema(tools: Sequence[tuple[str, Parameters | None]], key: str) -> dict[str, Any]:
    """The schema of a call of one of the tools: its name, and under ``key`` its arguments.

    Each tool's parameters, by name, move under $defs, and their references with them.
    """
    definitions = {}
    calls = []
    for number, (name, parameters) in enumerate(tools):
        place = f"tool{number}"
        if parameters is None:
            parameters = {"type": "object", "properties": {}, "additionalProperties": False}
        definitions[place] = _moved(parameters, f"#/$defs/{place}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, key: {"$ref": f"#/$defs/{place}"}},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    choice = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"$defs": definitions, **choice}


def value_schema(parameters: Parameters, name: str) -> Any:
    """The schema of one parameter's value alone, with all that it may refer to."""
    schema = properties_of(parameters)[name]
    if not _refers(schema):
        return schema
    pointer = quote(name.replace("~", "~0").replace("/", "~1"))
    moved = _moved(parameters, "#/$defs/tool")
    return {"$defs": {"tool": moved}, "$ref": f"#/$defs/tool/properties/{pointer}"}


def properties_of(parameters: Parameters | None) -> dict[str, Any]:
    """The parameters that have names, with their schemas, in order."""
    found = (parameters or {}).get("properties")
    return found if isinstance(found, dict) else {}


def kinds_of(parameters: Parameters | None) -> dict[str, list[str]]:
    """JSON types of each parameter that may be anything but text."""
    kinds = {
        name: sorted(_kinds(schema, parameters or {}, set()))
        for name, schema in properties_of(parameters).items()
    }
    return {name: types for name, types in kinds.items() if types != [TEXT]}


def texts_of(schema: Any) -> list[str]:
    """The texts that a schema lists; none if it lists nothing."""
    listed = schema.get("enum", [schema.get("const")]) if isinstance(schema, dict) else []
    if not isinstance(listed, list) or not all(isinstance(one, str) and one for one in listed):
        return []
    return list(dict.fromkeys(listed))


def _kinds(schema: Any, root: Parameters, followed: set[str]) -> set[str]:
    """Each reference is followed once: again it could add nothing."""
    if not isinstance(schema, dict):
        return set(_ALL_KINDS)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in followed:
            return set()
        followed.add(reference)
        return _kinds(_at(root, reference), root, followed)
    if isinstance(schema.get("enum"), list):
        return {kind_of(value) for value in schema["enum"]}
    if "const" in schema:
        return {kind_of(schema["const"])}
    named = schema.get("type")
    if isinstance(named, str | list):
        types = {named} if isinstance(named, str) else {one for one in named if type(one) is str}
        return types & set(_ALL_KINDS) or set(_ALL_KINDS)
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list) and schema[name]:
            cases = (_kinds(case, root, followed) for case in schema[name])
            return set[str]().union(*cases)
    return set(_ALL_KINDS)


def kind_of(value: object) -> str:
    """The JSON type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def json_of(text: str, kinds: Sequence[str]) -> str:
    """A value that a model wrote without quotes, as JSON; ``kinds`` are those it may have.

    What may be text, and is nothing else that it may be, is text.
    """
    bare = text.strip()
    bare = {"True": "true", "False": "false", "None": "null"}.get(bare, bare)  # Python's words
    try:
        kind = kind_of(json.loads(bare, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    is_wanted = kind in kinds or (kind == "integer" and "number" in kinds)
    if TEXT in kinds and (kind == TEXT or not is_wanted):
        return json.dumps(text, ensure_ascii=False)
    return bare


def _refuse(word: str) -> object:
    raise ValueError(f"{word} is not JSON")


def _at(root: Parameters, reference: str) -> Any:
    """What a reference within the schema points to; None if to nothing."""
    place: Any = root
    for step in unquote(reference.removeprefix("#")).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        place = place.get(name) if isinstance(place, dict) else None
    return place


def _refers(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_refers, value))
    return isinstance(value, dict) and ("$ref" in value or any(map(_refers, value.values())))


def _moved(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_moved(one, place) for one in value]
    if not isinstance(value, dict):
        return value
    moved = {name: _moved(one, place) for name, one in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
