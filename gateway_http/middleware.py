"""What stands around every route: errors become answers, bodies stay within bounds."""

import asyncio

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway_http.http_errors import error_response, invalid
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason

_log = structlog.get_logger()


class ErrorTranslator:
    """Answers whatever the routes raise. After the first byte it can only cut the connection."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # neither websockets nor lifespan events are served
        has_started = False

        async def watched_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            return  # in the middle of its body: nobody is there to be answered
        except Exception as error:
            if not isinstance(error, HeadwayError | HTTPException):
                _log.error("request.crashed", path=scope["path"], exc_info=error)
            if not has_started:
                response = error_response(error, scope["path"], self._settings)
                await response(scope, receive, send)


class BodyLimit:
    """Bounds one body, all bodies together, and the patience with a slow one."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings
        self._total_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_announced(scope)
        num_bytes = 0
        is_complete = False

        async def bounded_receive() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()  # waits for the client to hang up
            try:
                async with asyncio.timeout(self._settings.body_timeout_s):
                    message = await receive()
            except TimeoutError:
                raise invalid("The request body came too slowly.") from None
            size = len(message.get("body", b""))
            num_bytes += size
            self._total_bytes += size
            is_complete = not message.get("more_body", False)
            self._check(num_bytes)
            return message

        try:
            await self._app(scope, bounded_receive, send)
        finally:
            self._total_bytes -= num_bytes

    def _check_announced(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                self._check(int(value))

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._settings.max_body_bytes:
            message = f"A request body may have {self._settings.max_body_bytes} bytes."
            raise HeadwayError(Reason.BODY_TOO_LARGE, message)
        if self._total_bytes > self._settings.max_total_body_bytes:
            raise HeadwayError(Reason.NO_CAPACITY, "Too many large requests at once.")
