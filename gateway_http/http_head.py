"""What a request's head has to be before any handler sees it: version, target, and whose host.

Routes and keys go by the path alone, never by an address made of Host; a target with an address of
its own is refused, because then two names would claim the request (RFC 9112, section 3.2, wants it
taken; only clients of a proxy send it). A gateway that asks for no keys answers to names of this
machine only, or a page in a browser could reach it under a name that it has pointed here (DNS
rebinding). Addresses are always answered to, as nobody can point them.
"""

import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from gateway_http.http_errors import invalid
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason

ANY_HOST = "*"
_VERSIONS = ("1.0", "1.1")


class HeadRules:
    """The rules of one gateway."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._hosts = frozenset(name.lower() for name in settings.allowed_hosts)
        is_guarded = settings.has_keys or settings.allow_insecure
        self._is_any = ANY_HOST in self._hosts or (is_guarded and not self._hosts)

    def refusal(
        self, version: str, target: bytes, headers: Sequence[tuple[bytes, bytes]]
    ) -> HeadwayError | None:
        """What is wrong, if anything is; names of headers are in lower case."""
        if version not in _VERSIONS:
            return invalid("This server speaks HTTP/1.1.")
        if not target.startswith(b"/"):
            return invalid("The target must be a path: this is no proxy.")
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            return invalid("One Host header is needed.", "Host")
        if hosts and not self._answers_to(hosts[0]):
            message = "This server does not answer to that Host; see its setting allowed_hosts."
            return HeadwayError(Reason.PERMISSION_DENIED, message, field="Host")
        return None

    def _answers_to(self, value: bytes) -> bool:
        if self._is_any:
            return True
        if not self._hosts:
            return is_local_host(value)
        return _without_port(value) in self._hosts


@lru_cache(maxsize=256)
def is_local_host(value: bytes) -> bool:
    """Whether a Host is a name that no name server is asked for, or an address."""
    host = _without_port(value)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _without_port(value: bytes) -> str:
    text = value.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")
