"""Takes ``null`` for what it is to clients: the same as not to say anything.

SDKs write back what they have read with every field that their own classes know, null or not. A
body that does not fit its type is read once more without the nulls in it, wherever the type has
fields of its own; what a client wrote freely, such as a JSON Schema, keeps its nulls.
"""

import functools
import json
from typing import Any

import msgspec
from msgspec import inspect


def without_nulls(body: bytes, kind: type[msgspec.Struct]) -> bytes:
    """The same request. ``body`` is valid JSON, or ValueError comes."""
    value = msgspec.json.decode(body)
    _drop(value, _type_info(kind))
    return json.dumps(value).encode()  # msgspec writes no integers as long as it reads


_type_info = functools.cache(inspect.type_info)


def _drop(value: Any, kind: inspect.Type) -> None:
    match kind:
        case inspect.Metadata():
            _drop(value, kind.type)
        case inspect.UnionType():
            for one in kind.types:
                _drop(value, one)
        case inspect.ListType() if isinstance(value, list):
            for one in value:
                _drop(one, kind.item_type)
        case inspect.StructType() if isinstance(value, dict):
            fields = {field.encode_name: field.type for field in kind.fields}
            for name, one in list(value.items()):
                if one is None and not isinstance(fields.get(name), inspect.RawType):
                    del value[name]
                elif name in fields:
                    _drop(one, fields[name])
