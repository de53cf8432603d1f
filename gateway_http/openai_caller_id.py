"""A caller's own name for a call: its x-request-id is said back to it, whatever the answer is."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway_http.http_errors import error_response, invalid, log_fault
from gateway_http.http_request import header
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError

_HEADER = b"x-request-id"
CALLER_ID = r"[A-Za-z0-9_.:/+=-]{1,128}"
_PATTERN = re.compile(CALLER_ID)


def callers_id(scope: Scope) -> str:
    """Its x-request-id, if it is fit to be said back; else empty."""
    value = header(scope, _HEADER) or ""
    return value if _PATTERN.fullmatch(value) else ""


class CallerId:
    """Around an endpoint that raises HeadwayError before the first byte only."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        value = header(scope, _HEADER)
        if not value:
            await self._app(scope, receive, send)
            return
        if not _PATTERN.fullmatch(value):
            message = "An x-request-id has up to 128 letters, digits and -_.:/+= characters."
            raise invalid(message, _HEADER.decode())
        own = (_HEADER, value.encode())

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [one for one in message["headers"] if one[0] != _HEADER]
                message = {**message, "headers": [*headers, own]}
            await send(message)

        try:
            await self._app(scope, receive, named_send)
        except HeadwayError as error:
            log_fault(error, scope["path"])
            response = error_response(error, scope["path"], self._settings)
            await response(scope, receive, named_send)
