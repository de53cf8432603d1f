"""What stands beside the bodies, for the OpenAPI document: headers, and one query parameter.

Keys are not among them: they are the document's security schemes.
"""

from dataclasses import dataclass
from typing import Literal

from gateway_http.openai_caller_id import CALLER_ID
from gateway_http.openai_job import RESUME_HEADER


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of a call, or a header of its answer. ``pattern`` is what its value matches."""

    name: str
    summary: str
    pattern: str = "^.+$"
    place: Literal["header", "query"] = "header"
    is_required: bool = False


_PRINTABLE = "^[ -~]{1,256}$"
_COUNTS = "^[0-9]{1,9}(,[0-9]{1,9})*$"
_NUMBER = "^[0-9]{1,9}$"
_SECONDS = r"^[0-9]{1,9}(\.[0-9]{1,9})?$"

CALLERS_ID = Parameter(
    "x-request-id", "The caller's own name for this call; it is said back.", f"^{CALLER_ID}$"
)
CALL_NAMED = Parameter(
    "x-request-id", "As the caller named this call; else the scheduler's name of the request."
)
CHALLENGE = Parameter("www-authenticate", "How to show a key.")
_LAST_EVENT = Parameter(
    "Last-Event-ID", "The last event of the stream that was seen.", f"^.+:{_COUNTS[1:]}"
)
WISHES = (
    Parameter(
        "Idempotency-Key",
        "A repeated call with the key gets the first one's answer, unless that said to try again, "
        "or the rest of its stream.",
        _PRINTABLE,
    ),
    _LAST_EVENT,
    Parameter("x-headway-priority", "As `priority`, which comes before it.", _NUMBER),
    Parameter("x-headway-session-id", "As `session_id`, which comes before it.", _PRINTABLE),
)
_STATE = "What leads back to the stream, beside the ids of its events."
WAY_BACK = (
    Parameter("x-headway-request-id", "The scheduler's name of the request."),
    Parameter(RESUME_HEADER, _STATE),
)
PLACES = (
    Parameter(RESUME_HEADER, _STATE, is_required=True),
    _LAST_EVENT,
    Parameter("after", "What stands behind the colon of an event's id.", _COUNTS, "query"),
)

SAMPLE_KEY = Parameter(
    "X-Idempotency-Key",
    "Finds a sample that is sent again, where it has no number in a sampling session.",
    "^[ -~]{1,249}$",
)
READ_TIMEOUT = Parameter("X-Stainless-Read-Timeout", "Held for less: seconds.", _SECONDS)
POLLS = (
    Parameter("X-Tinker-Request-Type", "Whoever sends it is held until there is a result."),
    READ_TIMEOUT,
    Parameter("X-Stainless-Raw-Response", "Whoever sends it is told not to retry a 408."),
)
QUEUE_TOLD = (
    Parameter("retry-after", "Seconds until to ask again.", _NUMBER),
    Parameter("x-queue-status", "waiting or processing."),
    Parameter("x-queue-position", "Requests ahead.", _NUMBER),
    Parameter("x-queue-depth", "Requests that wait.", _NUMBER),
    Parameter("x-queue-eta-s", "Seconds until it starts.", _SECONDS),
    Parameter("x-should-retry", "false for a poller that sleeps by itself."),
)
