"""What the gateway signs."""

import base64
import json

import pytest
from tinker.lib._jwt_auth import _lifetime, jwt_claims

from gateway_http.tinker_tokens import SamplingSession, Signer
from headway.errors import HeadwayError

NOW_S = 1_700_000_000.5
LIFETIME_S = 3_600
SESSION = SamplingSession("org/model-ü", "session", 7)


def test_a_session_is_read_by_every_gateway_with_the_key() -> None:
    sealed = Signer(b"secret").session_id(SESSION)
    assert Signer(b"secret").session(sealed) == SESSION
    assert sealed == Signer(b"secret").session_id(SESSION)
    with pytest.raises(HeadwayError):
        Signer(b"other").session(sealed)


def test_a_session_id_needs_no_escape_in_a_url() -> None:
    sealed = Signer(b"secret").session_id(SESSION)
    assert sealed.replace("-", "").replace("_", "").replace(".", "").isalnum()
    assert sealed.isascii()


@pytest.mark.parametrize("text", ["", ".", "..", "a", "a.", ".a", "é.é", "====.====", "\x00"])
def test_no_text_passes_for_a_signature(text: str) -> None:
    signer = Signer(b"secret")
    with pytest.raises(HeadwayError):
        signer.session(text)
    assert signer.key_id(text, NOW_S) is None


def test_a_jwt_lives_as_long_as_it_is_told_as_the_sdk_reads_it() -> None:
    jwt = Signer(b"secret").jwt("alice", NOW_S, LIFETIME_S)
    assert _lifetime(jwt) == LIFETIME_S
    assert jwt_claims(jwt)["sub"] == "alice"
    assert Signer(b"secret").key_id(jwt, NOW_S + LIFETIME_S - 1) == "alice"
    assert Signer(b"secret").key_id(jwt, NOW_S + LIFETIME_S) is None


def test_a_jwt_chooses_neither_its_algorithm_nor_its_claims() -> None:
    signer = Signer(b"secret")
    header, claims, tag = signer.jwt("alice", NOW_S, LIFETIME_S).split(".")
    forged = base64.urlsafe_b64encode(json.dumps({"sub": "bob", "iat": 0, "exp": 10**12}).encode())
    nothing = base64.urlsafe_b64encode(b'{"alg":"none"}').decode()
    for parts in (
        (header, forged.decode().rstrip("="), tag),
        (nothing, claims, tag),
        (nothing, claims, ""),
        (header, claims, ""),
        (header, claims, tag[:-2]),
    ):
        assert signer.key_id(".".join(parts), NOW_S) is None
    assert Signer(b"other").key_id(".".join((header, claims, tag)), NOW_S) is None


def test_one_key_for_each_purpose() -> None:
    signer = Signer(b"secret")
    assert len(set(vars(signer).values())) == len(vars(signer)) == 2
    assert signer.key_id(signer.session_id(SESSION), NOW_S) is None
    with pytest.raises(HeadwayError):
        signer.session(signer.jwt("alice", NOW_S, LIFETIME_S))
