"""What stands around every route: errors become answers, bodies stay within bounds."""

import asyncio
import uuid
from collections.abc import Callable

import structlog
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway_http.cancellation import is_cancelled
from gateway_http.http_errors import error_response, invalid, log_fault
from gateway_http.http_protocol import IS_WHOLE
from gateway_http.openai_caller_id import callers_id
from gateway_http.settings import GatewaySettings
from gateway_http.stall_guard import Cause, StreamCutError
from headway.errors import INTERNAL_MESSAGE, HeadwayError
from headway.reasons import Reason

_log = structlog.get_logger()
_OWN_ID = "x-request-id"


class ErrorTranslator:
    """Answers whatever the routes raise. After the first byte it can only cut the connection.

    ``count`` is told of every answer's status as it begins, ``count_cut`` of every stream that
    ended because its client did not take it.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: GatewaySettings,
        count: Callable[[Scope, int], None],
        count_cut: Callable[[Scope, Cause], None],
    ) -> None:
        self._app = app
        self._settings = settings
        self._count = count
        self._count_cut = count_cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # neither websockets nor lifespan events are served
        start: Message | None = None

        async def watched_send(message: Message) -> None:
            nonlocal start
            if start is None:
                start = message
                self._count(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            return  # in the middle of its body: nobody is there to be answered
        except StreamCutError as cut:
            self._count_cut(scope, cut.cause)
            _log.warning(
                "stream.cut",
                path=scope["path"],
                cause=cut.cause,
                stream=cut.name,
                is_resumable=cut.is_resumable,
            )
        except (HeadwayError, HTTPException) as error:
            if isinstance(error, HeadwayError):
                log_fault(error, scope["path"])
            if start is None:
                response = error_response(error, scope["path"], self._settings)
                await response(scope, receive, watched_send)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                if start is not None:
                    raise  # the server's patience with what runs is over
                told = HeadwayError(Reason.DRAINING, "This gateway is shutting down.")
                own_id = callers_id(scope)
            else:
                told, own_id = _crashed(error, scope, start)
            if start is None:
                response = error_response(told, scope["path"], self._settings)
                if own_id:
                    response.headers[_OWN_ID] = own_id
                await response(scope, receive, watched_send)


def _crashed(error: BaseException, scope: Scope, start: Message | None) -> tuple[HeadwayError, str]:
    """A line in the log; its client gets to know no more of it than where we can look it up."""
    told_id = Headers(raw=start["headers"]).get(_OWN_ID) if start is not None else None
    own_id = told_id or callers_id(scope) or uuid.uuid4().hex
    _log.error("request.crashed", path=scope["path"], request_id=own_id, exc_info=error)
    return HeadwayError(Reason.INTERNAL, f"{INTERNAL_MESSAGE} We call it {own_id}."), own_id


class BodyLimit:
    """Bounds one body, all bodies together, and the patience with a slow one.

    Bodies are parsed in one go, which stops everybody else for as long, and a thread would not
    help: the parser holds the interpreter's lock. What costs is the number of values in the
    JSON, so they are counted while they come. Every value but the first follows a comma.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings
        self._total_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._settings
        is_openai = scope["path"].startswith("/v1/")
        max_bytes = settings.max_openai_body_bytes if is_openai else settings.max_body_bytes
        self._check_announced(scope, max_bytes)
        started: float | None = None  # when we began to wait
        num_bytes = num_values = 0
        is_complete = False
        is_whole = scope.get("state", {}).get(IS_WHOLE, _is_never)

        async def bounded_receive() -> Message:
            nonlocal started, num_bytes, num_values, is_complete
            if is_complete:
                return await receive()  # waits for the client to hang up
            if is_whole():
                message = await receive()
            else:
                started = started or asyncio.get_running_loop().time()
                patience_s = settings.body_timeout_s + num_bytes / settings.min_body_bytes_per_s
                message = await _received_by(started + patience_s, receive)
            body = message.get("body", b"")
            num_bytes += len(body)
            num_values += body.count(b",")
            self._total_bytes += len(body)
            is_complete = not message.get("more_body", False)
            self._check(num_bytes, max_bytes)
            if num_values > settings.max_body_values:
                text = f"A request body may have {settings.max_body_values} values."
                raise HeadwayError(Reason.BODY_TOO_LARGE, text)
            return message

        try:
            await self._app(scope, bounded_receive, send)
        finally:
            self._total_bytes -= num_bytes

    def _check_announced(self, scope: Scope, max_bytes: int) -> None:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                self._check(int(value), max_bytes)

    def _check(self, num_bytes: int, max_bytes: int) -> None:
        if num_bytes > max_bytes:
            message = f"A request body may have {max_bytes} bytes here."
            raise HeadwayError(Reason.BODY_TOO_LARGE, message)
        if self._total_bytes > self._settings.max_total_body_bytes:
            raise HeadwayError(Reason.NO_CAPACITY, "Too many large requests at once.")


async def _received_by(deadline_s: float, receive: Receive) -> Message:
    try:
        async with asyncio.timeout_at(deadline_s):
            return await receive()
    except TimeoutError:
        raise invalid("The request body came too slowly.") from None


def _is_never() -> bool:
    """Whether a body is whole, under a server that does not tell."""
    return False
