"""What every chat reads of its request; Starlette's own ways take several times as long."""

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name, which is in lower case."""
    for own_name, value in scope["headers"]:
        if own_name == name:
            text: str = value.decode("latin-1")
            return text
    return None


async def whole_body(receive: Receive) -> bytes:
    """All of the body. Raises ClientDisconnect if its client goes away in the middle of it."""
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)
