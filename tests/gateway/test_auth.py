"""API keys: who calls, with which limits, and what a changed file does."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import ValidationError
from starlette.requests import HTTPConnection

from gateway_http import keys
from gateway_http.auth import Caller, Tenants
from gateway_http.keys import KeyFileError, Scope
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

PEPPER = "a pepper for tests"
SIGNING_KEY = "a signing key for tests"


def connection(**headers: str) -> HTTPConnection:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return HTTPConnection({"type": "http", "headers": raw})


def bearer(key: str) -> HTTPConnection:
    return connection(authorization=f"Bearer {key}")


def entry(key: str, tenant: str = "alice", **fields: Any) -> str:
    return keys.entry_text(key, PEPPER.encode(), {"tenant": tenant, **fields})


def tenants_of(path: Path, *entries: str, **settings: Any) -> Tenants:
    path.write_text("\n".join(entries))
    return Tenants(
        GatewaySettings(
            api_keys_file=path,
            key_pepper=PEPPER,
            signing_key=SIGNING_KEY,
            api_keys_reload_s=1e-9,
            **settings,
        )
    )


def write(path: Path, text: str) -> None:
    path.write_text(text)


def refusal(tenants: Tenants, call: HTTPConnection, scope: Scope = Scope.SAMPLE) -> Reason:
    with pytest.raises(HeadwayError) as caught:
        tenants.caller(call, scope)
    return caught.value.reason


GOOD = f"[[keys]]\nid = 'abcd'\ntenant = 't'\nhash = '{'0' * 64}'"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


async def test_keys_in_the_settings_find_their_tenant() -> None:
    settings = GatewaySettings(api_keys="a=first-key,b=second,a=third=3", signing_key=SIGNING_KEY)
    assert "first-key" not in repr(settings)
    tenants = Tenants(settings)
    assert "first-key" not in repr(vars(tenants))
    assert tenants.caller(bearer("first-key")).tenant == "a"
    assert tenants.caller(connection(authorization="bearer second")).tenant == "b"
    assert tenants.caller(connection(x_api_key="third=3")).tenant == "a"
    for wrong in (
        connection(),
        bearer("first-ke"),
        connection(authorization="Basic first-key"),
    ):
        assert refusal(tenants, wrong) is Reason.UNAUTHENTICATED


def test_an_open_gateway_has_one_tenant() -> None:
    assert Tenants(GatewaySettings()).caller(connection(x_api_key="anything")) == Caller("")


async def test_a_key_of_the_file_brings_its_limits(path: Path) -> None:
    key = keys.new_key("tml")
    tenants = tenants_of(
        path, entry(key, requests_per_s=2.5, max_inflight=3, max_queued=2, tokens_per_minute=1000)
    )
    caller = tenants.caller(connection(x_api_key=key))
    request = generation_pb2.GenerationRequest()
    caller.sign(request)
    assert request.tenant == "alice"
    assert request.quota == generation_pb2.Quota(
        key_id=keys.key_id(key),
        requests_per_s=2.5,
        max_inflight=3,
        max_queued=2,
        tokens_per_minute=1000,
    )


async def test_a_key_without_limits_has_no_quota(path: Path) -> None:
    key = keys.new_key("hw")
    request = generation_pb2.GenerationRequest()
    tenants_of(path, entry(key)).caller(bearer(key)).sign(request)
    assert not request.HasField("quota")


async def test_two_keys_of_one_tenant_overlap_while_they_rotate(path: Path) -> None:
    old, new = keys.new_key("sk"), keys.new_key("sk")
    tenants = tenants_of(path, entry(old), entry(new))
    assert tenants.caller(bearer(old)).tenant == tenants.caller(bearer(new)).tenant == "alice"


@pytest.mark.parametrize("change", ["secret", "id", "prefix", "nothing left"])
async def test_a_key_that_is_not_to_the_letter_is_refused(path: Path, change: str) -> None:
    key = keys.new_key("tml")
    prefix, key_id, secret = key.split("-", 2)
    wrong = {
        "secret": f"{prefix}-{key_id}-{secret[:-1]}",
        "id": f"{prefix}-{'0' * 10}-{secret}",
        "prefix": f"sk-{key_id}-{secret}",
        "nothing left": f"{prefix}-{key_id}-",
    }[change]
    assert refusal(tenants_of(path, entry(key)), bearer(wrong)) is Reason.UNAUTHENTICATED


async def test_an_expired_key_is_refused(path: Path) -> None:
    old, new = keys.new_key("tml"), keys.new_key("tml")
    now = datetime.now(UTC)
    tenants = tenants_of(
        path,
        entry(old, expires=now - timedelta(seconds=1)),
        entry(new, expires=now + timedelta(hours=1)),
    )
    assert refusal(tenants, bearer(old)) is Reason.UNAUTHENTICATED
    assert tenants.by_id(keys.key_id(old)) is None
    assert tenants.caller(bearer(new)).tenant == "alice"


async def test_a_scope_that_a_key_lacks_is_denied(path: Path) -> None:
    key = keys.new_key("hw")
    tenants = tenants_of(path, entry(key, scopes=["monitor"]))
    assert refusal(tenants, bearer(key)) is Reason.PERMISSION_DENIED
    assert tenants.caller(bearer(key), Scope.MONITOR).tenant == "alice"


async def test_a_changed_file_counts_and_a_broken_one_does_not(path: Path) -> None:
    first, second = keys.new_key("hw"), keys.new_key("hw")
    tenants = tenants_of(path, entry(first))
    assert tenants.caller(bearer(first)).tenant == "alice"

    write(path, entry(second, "bob"))
    assert refusal(tenants, bearer(first)) is Reason.UNAUTHENTICATED
    assert tenants.caller(bearer(second)).tenant == "bob"

    write(path, "[[keys]]\nid = 7")
    with structlog.testing.capture_logs() as logs:
        assert tenants.caller(bearer(second)).tenant == "bob"
    assert [line["event"] for line in logs] == ["keys.refused"]

    os.unlink(path)
    with structlog.testing.capture_logs() as logs:
        assert tenants.caller(bearer(second)).tenant == "bob"
    assert [line["event"] for line in logs] == ["keys.refused"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keys = 3", "keys"),
        ("[[keys]]\n", "missing"),
        ("[[keys]]\nid = 'abcd'\ntenant = 't'\nhash = 'short'", "hash"),
        (f"[[keys]]\nid = 'AB'\ntenant = 't'\nhash = '{'0' * 64}'", "id"),
        (f"{GOOD}\nadmin = true", "admin"),
        (f"{GOOD}\nscopes = []", "scopes"),
        (
            f"{GOOD}\nmax_queued = -1",
            "max_queued",
        ),
        (
            f"{GOOD}\nexpires = 2030-01-01T00:00:00",
            "time zone",
        ),
        (f"{GOOD}\n" * 2, "same id"),
        ("[[keys", "keys.toml"),
    ],
)
def test_a_bad_file_is_refused_by_place(path: Path, text: str, problem: str) -> None:
    path.write_text(text)
    with pytest.raises(KeyFileError, match=problem):
        keys.read(path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"signing_key": SIGNING_KEY}, "key_pepper"),
        ({"signing_key": SIGNING_KEY, "key_pepper": "short"}, "key_pepper"),
        ({"key_pepper": PEPPER}, "signing_key"),
    ],
)
def test_a_file_of_keys_needs_its_secrets(path: Path, settings: Any, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        GatewaySettings(api_keys_file=path, **settings)


async def test_what_was_signed_for_a_key_ends_with_the_key(path: Path) -> None:
    key = keys.new_key("tml")
    tenants = tenants_of(path, entry(key))
    assert tenants.by_id(keys.key_id(key)) == tenants.caller(bearer(key))
    write(path, entry(key, scopes=["monitor"]))
    assert tenants.by_id(keys.key_id(key)) is None
    write(path, entry(keys.new_key("tml")))
    assert tenants.by_id(keys.key_id(key)) is None


def test_all_gateways_call_a_key_of_the_settings_the_same() -> None:
    first, second = (
        Tenants(GatewaySettings(api_keys=names, signing_key=SIGNING_KEY))
        for names in ("a=x,b=y", "b=y,a=x")
    )
    caller = first.caller(bearer("y"))
    assert second.by_id(caller.key_id) == caller


@pytest.mark.parametrize(
    ("arguments", "pepper", "problem"),
    [
        (["--tenant", ""], PEPPER, "tenant: Expected `str` of length >= 1"),
        (["--requests-per-s", "-1"], PEPPER, "requests_per_s: Expected `float` >= 0"),
        (["--requests-per-s", "inf"], PEPPER, "requests_per_s: Expected `float` <= 1"),
        (["--requests-per-s", "nan"], PEPPER, "requests_per_s: Expected `float`"),
        (["--max-inflight", "99999999999"], PEPPER, "max_inflight: Expected `int` <= 2147483647"),
        (["--expires", "tomorrow"], PEPPER, "argument --expires: neither a date nor a time"),
        (["--expires", "2020-01-01"], PEPPER, "argument --expires: this is in the past"),
        ([], "", "GATEWAY_KEY_PEPPER is not set"),
        ([], "short", "GATEWAY_KEY_PEPPER needs at least 16 characters"),
    ],
)
def test_no_entry_is_printed_that_a_gateway_would_refuse(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    pepper: str,
    problem: str,
) -> None:
    monkeypatch.setenv("GATEWAY_KEY_PEPPER", pepper)
    monkeypatch.setattr("sys.argv", ["keys", "--tenant", "alice", *arguments])
    with pytest.raises(SystemExit) as caught:
        keys.main()
    assert caught.value.code
    told = capsys.readouterr()
    assert not told.out
    assert problem in told.err


def test_a_new_key_is_printed_with_an_entry_that_takes_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GATEWAY_KEY_PEPPER", PEPPER)
    arguments = ["--tenant", 'al"ice', "--prefix", "tml", "--expires", "2999-01-01"]
    limits = ["--max-inflight", "7", "--requests-per-s", "0.5", "--scopes", "sample", "monitor"]
    monkeypatch.setattr("sys.argv", ["keys", *arguments, *limits])
    keys.main()
    text = capsys.readouterr().out
    key = text.splitlines()[0].rpartition(" ")[2]
    path.write_text(text)
    (read,) = keys.read(path).values()
    assert key.startswith("tml-")
    assert (read.id, read.tenant) == (keys.key_id(key), 'al"ice')
    assert read.hash == keys.digest(key, PEPPER.encode())
    assert (read.max_inflight, read.requests_per_s) == (7, 0.5)
    assert read.scopes == [Scope.SAMPLE, Scope.MONITOR]
    assert read.expires == datetime(2999, 1, 1, tzinfo=UTC)
