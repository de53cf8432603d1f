"""API keys: who is calling. Without keys everybody is the tenant ""."""

import hashlib
import hmac
import secrets

from starlette.requests import HTTPConnection

from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason


class Tenants:
    """Finds the tenant of a call. Only HMACs of keys are kept, under a secret of this process."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._pepper = secrets.token_bytes(32)
        self._keys: list[tuple[bytes, str]] = []
        for entry in settings.api_keys:
            tenant, _, key = entry.get_secret_value().partition("=")
            self._keys.append((self._digest(key), tenant))

    @property
    def is_open(self) -> bool:
        """Whether any key, or none, will do."""
        return not self._keys

    def of(self, connection: HTTPConnection) -> str:
        """The tenant whose key this call carries. Raises UNAUTHENTICATED."""
        if not self._keys:
            return ""
        found = None
        digest = self._digest(_presented_key(connection))
        for known, tenant in self._keys:  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise HeadwayError(Reason.UNAUTHENTICATED, "A valid API key is needed.")
        return found

    def _digest(self, key: str) -> bytes:
        return hmac.new(self._pepper, key.encode(), hashlib.sha256).digest()


def _presented_key(connection: HTTPConnection) -> str:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return connection.headers.get("x-api-key", "")
