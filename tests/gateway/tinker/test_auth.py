"""Who calls the Tinker endpoints: keys, and the tokens that stand for them."""

import time

import pytest
from tinker.types.auth_token_response import AuthTokenResponse
from tinker.types.client_config_response import ClientConfigResponse

from gateway_http.tinker_tokens import Signer
from tests.gateway.tinker_fakes import SETTINGS, ScriptedScheduler, client_of


async def test_client_config_offers_a_jwt_to_mint_keys_only(scheduler: ScriptedScheduler) -> None:
    for key, is_exchanged in (("tml-alice", False), ("sk-alice", True)):
        async with client_of(scheduler, key) as http:
            answer = (await http.post("client/config", json={"sdk_version": "0.38.0"})).json()
        assert ClientConfigResponse(**answer).pjwt_auth_enabled is is_exchanged


async def test_a_jwt_stands_for_the_key_it_was_given_for(scheduler: ScriptedScheduler) -> None:
    async with client_of(scheduler, "sk-alice") as http:
        answer = (await http.post("auth/token", json={})).json()
    jwt = AuthTokenResponse(**answer).jwt
    assert jwt.startswith("eyJ")
    async with client_of(scheduler, jwt) as http:
        await http.post("cancel_future", json={"request_id": "r"})
    assert scheduler.cancelled == [("r", "alice")]


async def test_an_open_gateway_takes_any_key_and_no_jwt_makes_another_tenant(
    scheduler: ScriptedScheduler,
) -> None:
    forged = Signer(SETTINGS.signing_secret()).jwt("somebody", time.time(), 600)
    for key in ("", "tml-x", "sk-x", forged):
        async with client_of(scheduler, key, is_open=True) as http:
            assert (await http.post("cancel_future", json={"request_id": "r"})).status_code == 200
    assert {tenant for _, tenant in scheduler.cancelled} == {""}


async def test_a_jwt_does_not_renew_itself(scheduler: ScriptedScheduler) -> None:
    async with client_of(scheduler, "sk-alice") as http:
        jwt = (await http.post("auth/token", json={})).json()["jwt"]
    async with client_of(scheduler, jwt) as http:
        response = await http.post("auth/token", json={})
        assert (await http.post("client/config", json={})).status_code == 200
    assert response.status_code == 401


@pytest.mark.parametrize("key", ["", "nothing", "eyJ.eyJ.x", "eyJhbGciOiJub25lIn0.e30."])
async def test_bad_keys_are_refused_everywhere_but_for_health(
    scheduler: ScriptedScheduler, key: str
) -> None:
    async with client_of(scheduler, key) as http:
        for path in ("client/config", "auth/token", "asample", "retrieve_future", "telemetry"):
            assert (await http.post(path, json={})).status_code == 401
        assert (await http.get("healthz")).json() == {"status": "ok"}


async def test_a_refused_jwt_is_marked_so_that_the_sdk_renews_it(
    scheduler: ScriptedScheduler,
) -> None:
    async with client_of(scheduler, "eyJ.eyJ.x") as http:
        response = await http.get("get_server_capabilities")
    assert 'error="invalid_token"' in response.headers["www-authenticate"]
