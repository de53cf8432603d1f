"""Who is calling: API keys from the settings and from a file, and what a key may do.

Without keys everybody is the tenant "", and only on loopback. With keys only their hashes are kept,
under a secret. An unknown key costs the same work as a known one, so time tells nothing.
"""

import asyncio
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog
from pydantic import SecretStr
from starlette.requests import HTTPConnection

from gateway_http import keys
from gateway_http.keys import KeyEntry, KeyFileError, Scope
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

_log = structlog.get_logger()
_NOBODY = "0" * 64  # no key has this digest


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose work it is, and the limits of the key that asked for it."""

    tenant: str
    key_id: str = ""
    quota: generation_pb2.Quota | None = None

    def sign(self, request: generation_pb2.GenerationRequest) -> None:
        """Make it this caller's."""
        request.tenant = self.tenant
        if self.quota is not None:
            request.quota.CopyFrom(self.quota)


_ANYBODY = Caller("")


class Tenants:
    """Finds the caller of a call."""

    def __init__(self, settings: GatewaySettings) -> None:
        # The settings' own keys are given in clear, so their pepper may be this process's own; but
        # all gateways must call them by the same ids.
        self._own_pepper = secrets.token_bytes(32)
        id_pepper = hmac.digest(settings.signing_secret(), b"headway api key id", "sha256")
        self._own = {
            keys.digest(key, self._own_pepper): Caller(tenant, keys.digest(key, id_pepper)[:16])
            for tenant, key in map(_split, settings.api_keys)
        }
        self._own_by_id = {caller.key_id: caller for caller in self._own.values()}
        self._pepper = settings.key_pepper.get_secret_value().encode()
        self._file = _KeyFile(settings) if settings.api_keys_file is not None else None

    @property
    def is_open(self) -> bool:
        """Whether any key, or none, will do."""
        return not self._own and self._file is None

    def caller(self, connection: HTTPConnection, scope: Scope = Scope.SAMPLE) -> Caller:
        """Whose key this call carries. Raises UNAUTHENTICATED or PERMISSION_DENIED."""
        if self.is_open:
            return _ANYBODY
        key = _presented_key(connection)
        own = self._own.get(keys.digest(key, self._own_pepper))
        entry = self._entry(key)
        if own is not None:
            return _allowed(own, list(Scope), scope)
        if entry is None:
            raise HeadwayError(Reason.UNAUTHENTICATED, "A valid API key is needed.")
        return _allowed(_caller(entry), entry.scopes, scope)

    def by_id(self, key_id: str) -> Caller | None:
        """The caller with this key, if it still may sample: for what was signed for it."""
        own = self._own_by_id.get(key_id)
        if own is not None or self._file is None:
            return own
        entry = self._file.entries().get(key_id)
        if entry is None or _has_expired(entry) or Scope.SAMPLE not in entry.scopes:
            return None
        return _caller(entry)

    def _entry(self, key: str) -> KeyEntry | None:
        if self._file is None:
            return None
        entry = self._file.entries().get(keys.key_id(key))
        expected = entry.hash if entry is not None else _NOBODY
        is_right = hmac.compare_digest(expected, keys.digest(key, self._pepper))
        return entry if entry is not None and is_right and not _has_expired(entry) else None


class _KeyFile:
    """The entries of the file, read again when it changes; a bad change is logged and not taken."""

    def __init__(self, settings: GatewaySettings) -> None:
        assert settings.api_keys_file is not None
        self._path: Path = settings.api_keys_file
        self._reload_s = settings.api_keys_reload_s
        self._entries = keys.read(self._path)
        self._seen = self._version()
        self._look_again_at = 0.0

    def entries(self) -> Mapping[str, KeyEntry]:
        """All entries by id."""
        now = asyncio.get_running_loop().time()
        if now >= self._look_again_at:
            self._look_again_at = now + self._reload_s
            version = self._version()
            if version != self._seen:
                self._seen = version
                self._reload()
        return self._entries

    def _version(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _reload(self) -> None:
        try:
            self._entries = keys.read(self._path)
        except KeyFileError as error:
            _log.error("keys.refused", error=str(error))
        else:
            _log.info("keys.loaded", num_keys=len(self._entries))


def _allowed(caller: Caller, scopes: list[Scope], wanted: Scope) -> Caller:
    if wanted not in scopes:
        message = f"This API key lacks the scope {wanted}."
        raise HeadwayError(Reason.PERMISSION_DENIED, message)
    return caller


def _caller(entry: KeyEntry) -> Caller:
    quota = generation_pb2.Quota(
        key_id=entry.id,
        requests_per_s=entry.requests_per_s,
        max_inflight=entry.max_inflight,
        max_queued=entry.max_queued,
        tokens_per_minute=entry.tokens_per_minute,
    )
    has_limits = quota != generation_pb2.Quota(key_id=entry.id)
    return Caller(entry.tenant, entry.id, quota if has_limits else None)


def _has_expired(entry: KeyEntry) -> bool:
    return entry.expires is not None and entry.expires <= datetime.now(UTC)


def _split(pair: SecretStr) -> tuple[str, str]:
    tenant, _, key = pair.get_secret_value().partition("=")
    return tenant, key


def _presented_key(connection: HTTPConnection) -> str:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return connection.headers.get("x-api-key", "")
