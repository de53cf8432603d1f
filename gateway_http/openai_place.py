"""How far a reader has come in a stream, which the ids of its events say.

An id is ``<stream>:<count>,<count>,...`` with a count for each choice, in the order of their
indexes: the tokens that were told, one more for an echoed prompt and one for the end. So one id
places all choices, in whatever order their tokens came. A response has a single count, the
``sequence_number`` of the event. A stream has the name of its request; one of several prompts is
several requests, and a digest of the others' names stands behind the first one's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from gateway_http.http_errors import invalid
from gateway_http.http_request import header

MAX_CHOICES = 64  # of a stream that can be continued: the ids of its events end in a header
_HEADER = "Last-Event-ID"


@dataclass(frozen=True, slots=True)
class Place:
    """Behind the event with this id."""

    stream: str
    counts: tuple[int, ...]


def stream_name(request_ids: Sequence[str]) -> str:
    """One name for the requests that make up a stream."""
    first, *others = request_ids
    if not others:
        return first
    return f"{first}+{hashlib.sha256('/'.join(others).encode()).hexdigest()[:16]}"


def last_event(request: Request, num_counts: int) -> Place | None:
    """What the Last-Event-ID says. Raises INVALID_REQUEST."""
    value = header(request.scope, b"last-event-id")
    if value is None:
        return None
    stream, _, counts = value.rpartition(":")
    if not stream:
        raise invalid("The Last-Event-ID is not the id of an event.", _HEADER)
    return Place(stream, read_counts(counts, num_counts, _HEADER))


def read_counts(text: str, num_counts: int, field: str) -> tuple[int, ...]:
    """Counts as an id has them. Raises INVALID_REQUEST."""
    counts = text.split(",", num_counts)
    if len(counts) != num_counts or not all(map(is_count, counts)):
        raise invalid(f"The place in this stream is a count for each of {num_counts}.", field)
    return tuple(map(int, counts))


def is_count(text: str) -> bool:
    """A number of events."""
    return text.isascii() and text.isdigit() and len(text) < 10
