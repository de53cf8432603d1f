"""Errors as HTTP: the one place where a HeadwayError becomes a status, headers and a body.

Whose body it is decides the path's prefix: OpenAI under /v1 and for vLLM's two beside it, Tinker
under /api/v1, plain elsewhere. SDKs retry by status on their own, so every error says
x-should-retry.
"""

import math
from http import HTTPStatus
from typing import Any

import orjson
import structlog
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason

_log = structlog.get_logger()

_OPENAI_PATHS = ("/v1/", "/tokenize", "/detokenize")
# Where clients look for OpenAI's own word; the other codes are our reasons.
_OPENAI_CODES = {
    Reason.PROMPT_TOO_LONG: "context_length_exceeded",
    Reason.UNAUTHENTICATED: "invalid_api_key",
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class UnsupportedParameterError(HeadwayError):
    """A parameter that we do not honour, and therefore refuse."""

    def __init__(self, field: str, hint: str = "") -> None:
        message = f"The parameter {field} is not supported{hint}."
        super().__init__(Reason.INVALID_REQUEST, message, field=field)


def invalid(message: str, field: str | None = None) -> HeadwayError:
    """A request that is wrong in itself."""
    return HeadwayError(Reason.INVALID_REQUEST, message, field=field)


def no_such_path() -> HeadwayError:
    """Nothing is here, or nothing for anybody."""
    message = "There is no such path here; /openapi.json lists those that there are."
    return HeadwayError(Reason.REQUEST_NOT_FOUND, message)


def openai_error(error: HeadwayError, status: int | None = None) -> dict[str, Any]:
    """An error as OpenAI's SDKs read it: a body, or the last event of a stream."""
    status = status or error.row.http_status
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = _OPENAI_CODES.get(error.reason, error.reason.value.lower())
    is_unsupported = isinstance(error, UnsupportedParameterError)
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_TYPES.get(status, kind),
            "code": "unsupported_parameter" if is_unsupported else code,
            "param": error.field,
        }
    }


def _body(error: HeadwayError, status: int, path: str) -> dict[str, Any]:
    if path.startswith(_OPENAI_PATHS):
        return openai_error(error, status)
    body = {"error": error.message, "code": error.reason.value}
    if path.startswith("/api/v1/"):
        body["detail"] = error.message
    return body


def error_response(
    error: HeadwayError | HTTPException,
    path: str,
    settings: GatewaySettings,
    *,
    status: int | None = None,
) -> Response:
    """A refusal as an answer, whoever makes it."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):  # the router's own: no such path, no such method
        status = error.status_code
        headers.update(error.headers or {})
        error = (
            no_such_path() if error.status_code == HTTPStatus.NOT_FOUND else invalid(error.detail)
        )
    status = status or error.row.http_status
    headers["x-should-retry"] = "true" if error.row.is_retryable else "false"
    if error.retry_after_ms is not None:
        seconds = math.ceil(error.retry_after_ms / 1000)
        bounded = min(max(seconds, settings.retry_after_min_s), settings.retry_after_max_s)
        headers["retry-after"] = str(bounded)
    if error.reason is Reason.UNAUTHENTICATED:
        headers["www-authenticate"] = 'Bearer error="invalid_token"'
    return json_response(_body(error, status, path), status, headers)


def log_fault(error: HeadwayError, path: str) -> None:
    """An error that is nobody's fault but ours leaves a line."""
    if error.row.http_status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("request.failed", path=path, reason=error.reason, message=error.message)


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """JSON with a Content-Length."""
    return Response(orjson.dumps(content), status, headers, "application/json")
