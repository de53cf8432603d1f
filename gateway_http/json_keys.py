"""Refuses JSON that names a key twice in one object: which value was meant is anybody's guess.

RFC 8259, section 4, leaves it open, and parsers differ. msgspec takes the last one and does not
tell, so the standard library's scanner, written in C as well, looks once more. Long lists of
numbers, which most of a long body is, are taken out first: they have no keys.
"""

import json
import re
from typing import NoReturn

from gateway_http.http_errors import invalid

_NUMBERS = re.compile(rb"\[[0-9,\s]{64,}+\]")
_MAX_ECHO = 100

_Pairs = list[tuple[str, object]]


def check_keys(body: bytes) -> None:
    """Raises INVALID_REQUEST with the key's name. ``body`` is valid JSON, or ValueError comes."""
    _scan(_NUMBERS.sub(b"[]", body).decode().lstrip())


def _check(pairs: _Pairs) -> None:
    if len(dict(pairs)) < len(pairs):
        _refuse(pairs)


def _refuse(pairs: _Pairs) -> NoReturn:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            break
        seen.add(key)
    name = key[:_MAX_ECHO]
    raise invalid(f"The body says {name!r} twice.", name)


# A number's value does not matter, and an int of many digits would be refused.
_scan = json.JSONDecoder(object_pairs_hook=_check, parse_int=float).raw_decode
