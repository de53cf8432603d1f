"""The error table: every way a request can fail, in one place, for gRPC and for HTTP.

Inside a process an error is a HeadwayError. It crosses gRPC as google.rpc.Status in the trailer
``grpc-status-details-bin`` (https://google.aip.dev/193) and becomes a HeadwayError again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from headway.reasons import Reason

DOMAIN = "headway"
HTTP_CLIENT_CLOSED_REQUEST = 499

_log = structlog.get_logger()


class ErrorRow(NamedTuple):
    """One line of the table. ``is_retryable``: the same request may succeed later."""

    code: grpc.StatusCode
    http_status: int
    is_retryable: bool = False


TABLE: dict[Reason, ErrorRow] = {
    Reason.INVALID_REQUEST: ErrorRow(grpc.StatusCode.INVALID_ARGUMENT, 400),
    Reason.PROMPT_TOO_LONG: ErrorRow(grpc.StatusCode.INVALID_ARGUMENT, 400),
    Reason.UNAUTHENTICATED: ErrorRow(grpc.StatusCode.UNAUTHENTICATED, 401),
    Reason.PERMISSION_DENIED: ErrorRow(grpc.StatusCode.PERMISSION_DENIED, 403),
    Reason.MODEL_NOT_FOUND: ErrorRow(grpc.StatusCode.NOT_FOUND, 404),
    Reason.REQUEST_NOT_FOUND: ErrorRow(grpc.StatusCode.NOT_FOUND, 404),
    # 409 is retried by SDKs on their own
    Reason.REQUEST_ID_CONFLICT: ErrorRow(grpc.StatusCode.ALREADY_EXISTS, 422),
    Reason.RESULT_EXPIRED: ErrorRow(grpc.StatusCode.NOT_FOUND, 410),
    Reason.BODY_TOO_LARGE: ErrorRow(grpc.StatusCode.INVALID_ARGUMENT, 413),
    Reason.QUEUE_FULL: ErrorRow(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, True),
    Reason.QUOTA_EXCEEDED: ErrorRow(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, True),
    Reason.DEADLINE_UNREACHABLE: ErrorRow(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, True),
    Reason.CANCELLED: ErrorRow(grpc.StatusCode.CANCELLED, HTTP_CLIENT_CLOSED_REQUEST),
    Reason.NO_CAPACITY: ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, True),
    Reason.QUEUE_TIMEOUT: ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, True),
    Reason.DRAINING: ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, True),
    Reason.NOT_LEADER: ErrorRow(grpc.StatusCode.UNAVAILABLE, 503, True),
    Reason.EXECUTION_TIMEOUT: ErrorRow(grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    Reason.STALE_LEASE: ErrorRow(grpc.StatusCode.FAILED_PRECONDITION, 409),
    Reason.ATTEMPTS_EXHAUSTED: ErrorRow(grpc.StatusCode.INTERNAL, 500),
    Reason.INTERNAL: ErrorRow(grpc.StatusCode.INTERNAL, 500),
}

# Statuses that gRPC makes by itself, without our details.
_BARE_CODES = {
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_REQUEST,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.NO_CAPACITY,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.BODY_TOO_LARGE,
    grpc.StatusCode.UNAVAILABLE: Reason.NO_CAPACITY,
}

INTERNAL_MESSAGE = "Something went wrong on our side."


class HeadwayError(Exception):
    """A refusal or failure that its client is told. ``message`` is safe to show to anybody.

    ``retry_after_ms`` is set for retryable reasons; ``field`` names the offending input.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        retry_after_ms: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        row = TABLE[reason]
        self.retry_after_ms = (retry_after_ms or 1000) if row.is_retryable else None

    @property
    def row(self) -> ErrorRow:
        """The table's line for this error."""
        return TABLE[self.reason]


def to_status(error: HeadwayError) -> status_pb2.Status:
    """Encode with ErrorInfo and, where they apply, RetryInfo, QuotaFailure or BadRequest."""
    code: int = error.row.code.value[0]
    status = status_pb2.Status(code=code, message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN))
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if code == code_pb2.RESOURCE_EXHAUSTED:
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=error.reason.value, description=error.message
        )
        status.details.add().Pack(error_details_pb2.QuotaFailure(violations=[violation]))
    if error.field is not None:
        field = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[field]))
    return status


def from_rpc_error(error: grpc.aio.AioRpcError) -> HeadwayError:
    """Decode what ``to_status`` encoded; a bare gRPC status becomes its nearest reason."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # details that contradict their status: not from us
        status = None
    reason, retry_after_ms, field = None, None, None
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
            reason = Reason(info.reason)
        elif detail.Unpack(retry):
            retry_after_ms = retry.retry_delay.ToMilliseconds()
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
    if reason is None:
        reason = _BARE_CODES.get(error.code(), Reason.INTERNAL)
        return HeadwayError(reason, "The scheduler could not be reached.")
    return HeadwayError(reason, error.details() or "", retry_after_ms=retry_after_ms, field=field)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: HeadwayError) -> NoReturn:
    """End a call with an error of the table."""
    encoded = rpc_status.to_status(to_status(error))
    await context.abort(encoded.code, encoded.details, encoded.trailing_metadata)
    raise AssertionError("abort raises")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Translates what handlers raise: HeadwayError by the table, anything else to INTERNAL.

    The text of an unknown exception stays in the log.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # an unknown method: gRPC answers UNIMPLEMENTED
            return None
        method = handler_call_details.method
        parse = _parser(handler.request_deserializer)
        if handler.response_streaming:
            inner_stream = handler.unary_stream or handler.stream_stream

            async def stream(request: Any, context: Any) -> Any:
                try:
                    _refuse_garbage(request)
                    async for response in inner_stream(request, context):
                        yield response
                except Exception as error:
                    await _translate(error, context, method)

            if handler.request_streaming:
                return grpc.stream_stream_rpc_method_handler(
                    stream, handler.request_deserializer, handler.response_serializer
                )
            return grpc.unary_stream_rpc_method_handler(stream, parse, handler.response_serializer)
        inner = handler.unary_unary

        async def unary(request: Any, context: Any) -> Any:
            try:
                _refuse_garbage(request)
                return await inner(request, context)
            except Exception as error:
                await _translate(error, context, method)

        return grpc.unary_unary_rpc_method_handler(unary, parse, handler.response_serializer)


def _parser(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """gRPC answers UNKNOWN, with the exception's text, to a deserializer that raises."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception as error:  # protobuf has one class of error for each implementation
            return error

    return parse


def _refuse_garbage(request: Any) -> None:
    if isinstance(request, Exception):
        raise HeadwayError(Reason.INVALID_REQUEST, "The bytes are not a message of this call.")


async def _translate(error: Exception, context: Any, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
        raise error
    if not isinstance(error, HeadwayError):
        _log.error("call.failed", method=method, exc_info=error)
        error = HeadwayError(Reason.INTERNAL, INTERNAL_MESSAGE)
    await abort(context, error)
