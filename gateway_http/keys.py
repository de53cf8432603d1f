"""API keys as they lie in a file: hashed, with their tenant, scopes, limits and end.

A key reads ``<prefix>-<id>-<secret>``. The id is public and finds the entry; the file holds only an
HMAC-SHA256 of the whole key under a pepper that is not in the file, so neither is worth anything
alone. Prefixes are those that clients insist on: ``tml`` for tinker, ``sk`` for MinT and OpenAI.

    python -m gateway_http.keys --tenant alice --prefix tml --max-inflight 100

prints a new key, once, and the entry for the file; the pepper comes from the gateway's settings.
"""

import argparse
import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gateway_http.settings import MIN_SECRET_CHARS, GatewaySettings

PREFIXES = ("hw", "sk", "tml")
_ID_BYTES = 5
_SECRET_BYTES = 32


class Scope(StrEnum):
    """What a key may be used for."""

    SAMPLE = "sample"
    MONITOR = "monitor"


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One [[keys]] of the file; a limit of 0 is none."""

    id: Annotated[str, Meta(pattern=r"^[a-z0-9]{4,32}$")]
    tenant: Annotated[str, Meta(min_length=1, max_length=256)]
    hash: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[list[Scope], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: [Scope.SAMPLE]
    )
    expires: datetime | None = None
    requests_per_s: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    max_inflight: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    max_queued: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    tokens_per_minute: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[KeyEntry]


class KeyFileError(ValueError):
    """The file cannot be used; the text names the place, and holds no hash."""


def read(path: Path) -> Mapping[str, KeyEntry]:
    """All entries by id. Raises KeyFileError."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        entries = msgspec.convert(raw, _File).keys
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise KeyFileError(f"{path}: {error}") from None
    by_id = {entry.id: entry for entry in entries}
    if len(by_id) < len(entries):
        raise KeyFileError(f"{path}: two keys have the same id")
    for entry in entries:
        if entry.expires is not None and entry.expires.tzinfo is None:
            raise KeyFileError(f"{path}: {entry.id}: expires needs a time zone")
    return by_id


def key_id(key: str) -> str:
    """The public part; empty if there is none."""
    parts = key.split("-", 2)
    return parts[1] if len(parts) == 3 else ""


def digest(key: str, pepper: bytes) -> str:
    """What the file holds of a key."""
    return hmac.new(pepper, key.encode(), hashlib.sha256).hexdigest()


def new_key(prefix: str) -> str:
    """An unguessable key."""
    return f"{prefix}-{secrets.token_hex(_ID_BYTES)}-{secrets.token_urlsafe(_SECRET_BYTES)}"


def entry_text(key: str, pepper: bytes, fields: Mapping[str, Any]) -> str:
    """The key's entry as TOML; limits that are not set are left out. Raises KeyFileError."""
    given = {name: value for name, value in fields.items() if value not in (None, 0)}
    entry = {"id": key_id(key), "hash": digest(key, pepper), **given}
    try:
        msgspec.convert(entry, KeyEntry)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$.")
        raise KeyFileError(f"{place.rstrip('`')}: {message}") from None
    lines = ["[[keys]]"]
    for name, value in entry.items():
        # JSON's texts, numbers and lists of texts are TOML, too
        is_time = isinstance(value, datetime)
        text = value.isoformat() if is_time else msgspec.json.encode(value).decode()
        lines.append(f"{name} = {text}")
    return "\n".join(lines)


def _expiry(text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        message = "neither a date nor a time, such as 2030-01-31 or 2030-01-31T12:00+01:00"
        raise argparse.ArgumentTypeError(message) from None
    when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    if when <= datetime.now(UTC):
        raise argparse.ArgumentTypeError("this is in the past")
    return when


def main() -> None:
    """Print a new key and its entry."""
    parser = argparse.ArgumentParser(prog="python -m gateway_http.keys", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tenant", required=True, help="whose work and results these are")
    add("--prefix", choices=PREFIXES, default="hw", help="what clients look for")
    add("--scopes", nargs="+", choices=list(Scope), default=[Scope.SAMPLE], help="it opens these")
    add("--expires", type=_expiry, help="date or time, UTC unless it says else")
    add("--requests-per-s", type=float, default=0.0, help="on average; 0, here and below: no limit")
    add("--max-inflight", type=int, default=0, help="accepted and not ended")
    add("--max-queued", type=int, default=0, help="accepted and not begun")
    add("--tokens-per-minute", type=int, default=0, help="prompts and max_tokens")
    arguments = vars(parser.parse_args())
    settings = GatewaySettings.load("headway-gateway", [])
    pepper = settings.key_pepper.get_secret_value().encode()
    if not pepper:
        parser.exit(1, "GATEWAY_KEY_PEPPER is not set: the gateways need the same one\n")
    if len(settings.key_pepper.get_secret_value()) < MIN_SECRET_CHARS:
        parser.exit(1, f"GATEWAY_KEY_PEPPER needs at least {MIN_SECRET_CHARS} characters\n")
    key = new_key(arguments.pop("prefix"))
    try:
        text = entry_text(key, pepper, arguments)
    except KeyFileError as error:
        parser.error(str(error))
    print(f"# the key, shown only now: {key}\n{text}")  # noqa: T201


if __name__ == "__main__":
    main()
