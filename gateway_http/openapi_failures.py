"""How the endpoints can fail, by what they do: rows of the error table, for the OpenAPI document.

A row is named where its status can be the answer to a call of that endpoint. What ends a stream
after its first byte is no status any more. STALE_LEASE is between scheduler and executors.
"""

from collections.abc import Collection, Sequence
from typing import Any

from gateway_http.openapi_parameters import CALL_NAMED, CHALLENGE, Parameter
from headway.errors import TABLE, ErrorRow
from headway.reasons import Reason

Reasons = frozenset[Reason]

# Around any endpoint: wrong heads and bodies, foreign hosts, crowds, a shutdown, our own faults.
DOOR = Reasons(
    (
        Reason.INVALID_REQUEST,
        Reason.PERMISSION_DENIED,
        Reason.BODY_TOO_LARGE,
        Reason.NO_CAPACITY,
        Reason.DRAINING,
        Reason.INTERNAL,
    )
)
# Whoever needs a key may have none, or one without the scope.
KEY = Reasons((Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED))
NAMED_REQUEST = Reasons((Reason.REQUEST_NOT_FOUND,))
# The scheduler is asked.
LOOKS = Reasons((Reason.NOT_LEADER,))
NAMED_MODEL = LOOKS | {Reason.MODEL_NOT_FOUND}
TEXT = NAMED_MODEL | {Reason.PROMPT_TOO_LONG}
# One more place is wanted on the gateway's stream to the scheduler.
FOLLOWS = NAMED_MODEL | {Reason.REQUEST_NOT_FOUND, Reason.RESULT_EXPIRED, Reason.QUOTA_EXCEEDED}
SUBMITS = NAMED_MODEL | {
    Reason.PROMPT_TOO_LONG,
    Reason.REQUEST_ID_CONFLICT,
    Reason.QUEUE_FULL,
    Reason.QUOTA_EXCEEDED,
    Reason.DEADLINE_UNREACHABLE,
}
# The answer is the end of the request.
GENERATES = SUBMITS | {
    Reason.RESULT_EXPIRED,
    Reason.CANCELLED,
    Reason.QUEUE_TIMEOUT,
    Reason.EXECUTION_TIMEOUT,
    Reason.ATTEMPTS_EXHAUSTED,
}
RETRIEVES = LOOKS | {Reason.REQUEST_NOT_FOUND, Reason.RESULT_EXPIRED}

_NOBODY = TABLE[Reason.UNAUTHENTICATED].http_status


def described(reasons: Collection[Reason], family: str, content: Any) -> dict[int, dict[str, Any]]:
    """Their answers by status, with the headers and the content that a family's errors have."""
    found: dict[int, dict[str, Any]] = {}
    for reason, row in TABLE.items():  # in its order
        if reason in reasons:
            answer = found.setdefault(row.http_status, {"description": "", "content": content})
            answer["description"] += f"{', ' if answer['description'] else ''}{reason.value}"
            answer["headers"] = _headers_of(row, family)
    return found


def _headers_of(row: ErrorRow, family: str) -> dict[str, Any]:
    should = {"schema": {"enum": ["true" if row.is_retryable else "false"]}, "required": True}
    headers: dict[str, Any] = {"x-should-retry": should}
    if row.is_retryable:
        headers["retry-after"] = {"schema": {"type": "integer", "minimum": 1}, "required": True}
    if family == "openai":
        headers |= named((CALL_NAMED,))
    if row.http_status == _NOBODY:
        headers |= named((CHALLENGE,))
    return headers


def named(told: Sequence[Parameter]) -> dict[str, Any]:
    """Headers of an answer."""
    return {one.name: text_of(one) for one in told}


def text_of(parameter: Parameter) -> dict[str, Any]:
    """What stands in it, whoever sends it."""
    schema = {"type": "string", "pattern": parameter.pattern}
    return {"description": parameter.summary, "schema": schema}
