"""What is wrong with a body, in our words: msgspec's, the scanner's and Python's own complaints."""

import re

import msgspec

from gateway_http.http_errors import UnsupportedParameterError, invalid
from headway.errors import HeadwayError

_MISSING = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]{1,100})`")
_MALFORMED = "JSON is malformed: "
_TRUNCATED = "Input data was truncated"


def wrong_body(error: ValueError | RecursionError, body: bytes) -> HeadwayError:
    """INVALID_REQUEST, with the parameter's name or the place in the body."""
    if isinstance(error, msgspec.ValidationError):
        return _wrong_parameter(str(error))
    if isinstance(error, RecursionError):
        return invalid("The body's JSON is nested too deeply.")
    if not body.strip():
        return invalid("The body is empty.")
    text = str(error)
    if text == _TRUNCATED:
        return invalid("The body is not valid JSON: it ends too early.")
    if text.startswith(_MALFORMED):
        return invalid(f"The body is not valid JSON: {text.removeprefix(_MALFORMED)}.")
    return invalid("The body is not valid JSON.")


def _wrong_parameter(text: str) -> HeadwayError:
    """msgspec's message: "... - at `$.path`" or the name of a missing field."""
    message, _, path = text.partition(" - at `")
    path = path.rstrip("`").removeprefix("key` in `").removeprefix("$").removeprefix(".")
    missing, unknown = _MISSING.fullmatch(message), _UNKNOWN.fullmatch(message)
    if unknown:
        return UnsupportedParameterError(".".join(filter(None, (path, unknown[1]))))
    if missing:
        path = ".".join(filter(None, (path, missing[1])))
        return invalid(f"The parameter {path} is missing.", path)
    return invalid(f"{message}: {path or 'body'}.", path or None)
