"""A caller's own name for a call: its x-request-id is said back to it, whatever the answer is."""

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway_http.http_errors import error_response, invalid, log_fault
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError

_HEADER = "x-request-id"
CALLER_ID = r"[A-Za-z0-9_.:/+=-]{1,128}"
_PATTERN = re.compile(CALLER_ID)


def callers_id(scope: Scope) -> str:
    """Its x-request-id, if it is fit to be said back; else empty."""
    value = Headers(scope=scope).get(_HEADER, "")
    return value if _PATTERN.fullmatch(value) else ""


class CallerId:
    """Around an endpoint that raises HeadwayError before the first byte only."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        value = Headers(scope=scope).get(_HEADER)
        if not value:
            await self._app(scope, receive, send)
            return
        if not _PATTERN.fullmatch(value):
            message = "An x-request-id has up to 128 letters, digits and -_.:/+= characters."
            raise invalid(message, _HEADER)
        own = (_HEADER.encode(), value.encode())

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message["headers"] if header[0] != own[0]]
                message = {**message, "headers": [*headers, own]}
            await send(message)

        try:
            await self._app(scope, receive, named_send)
        except HeadwayError as error:
            log_fault(error, scope["path"])
            response = error_response(error, scope["path"], self._settings)
            await response(scope, receive, named_send)
