"""What the gateway signs instead of remembering: sampling sessions and short-lived tokens.

A sampling session's id holds all there is to know about it, so it survives restarts and works at
every gateway that has the same signing key. The same session gets the same id again. A JWT stands
for the API key that it was exchanged for, until it expires. Both are authentic, not secret.
"""

import base64
import hashlib
import hmac
from typing import NamedTuple

import msgspec

from headway.errors import HeadwayError
from headway.reasons import Reason

_SESSION_MAC_BYTES = 16


class SamplingSession(NamedTuple):
    """What create_sampling_session was asked for."""

    model: str
    session_id: str
    seq_id: int


class _Claims(msgspec.Struct, frozen=True):
    sub: str
    iat: int
    exp: int


class Signer:
    """Signs with keys derived from one secret, one key for each purpose."""

    def __init__(self, secret: bytes) -> None:
        self._session_key = _mac(secret, b"headway tinker sampling session")
        self._jwt_key = _mac(secret, b"headway tinker jwt")

    def session_id(self, session: SamplingSession) -> str:
        """An id made of characters that need no escape in a URL."""
        payload = msgspec.json.encode(session)
        tag = _mac(self._session_key, payload)[:_SESSION_MAC_BYTES]
        return f"{_encode(payload)}.{_encode(tag)}"

    def session(self, sampling_session_id: str) -> SamplingSession:
        """Read an id that some gateway with this key made."""
        payload, tag = _split(sampling_session_id)
        if not hmac.compare_digest(_mac(self._session_key, payload)[:_SESSION_MAC_BYTES], tag):
            message = "This sampling session is not known here."
            raise HeadwayError(Reason.REQUEST_NOT_FOUND, message, field="sampling_session_id")
        return msgspec.json.decode(payload, type=SamplingSession)

    def jwt(self, key_id: str, now_s: float, lifetime_s: int) -> str:
        """A token that stands for this key (RFC 7519, HS256)."""
        issued = int(now_s)
        claims = _Claims(key_id, issued, issued + lifetime_s)
        signed = f"{_JWT_HEADER}.{_encode(msgspec.json.encode(claims))}"
        return f"{signed}.{_encode(_mac(self._jwt_key, signed.encode()))}"

    def key_id(self, jwt: str, now_s: float) -> str | None:
        """The key that it stands for; None if it is not ours or has expired.

        The header must be our own to the letter, so a token cannot choose its algorithm.
        """
        signed, _, tag = jwt.rpartition(".")
        header, _, claims = signed.partition(".")
        if header != _JWT_HEADER:
            return None
        if not hmac.compare_digest(_mac(self._jwt_key, signed.encode()), _decode(tag)):
            return None
        read = msgspec.json.decode(_decode(claims), type=_Claims)
        return read.sub if now_s < read.exp else None


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)


def _split(signed: str) -> tuple[bytes, bytes]:
    payload, _, tag = signed.rpartition(".")
    return _decode(payload), _decode(tag)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """Empty for what is not base64: an empty tag matches nothing."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return b""


_JWT_HEADER = _encode(b'{"alg":"HS256","typ":"JWT"}')
