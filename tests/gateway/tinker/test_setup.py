"""Tinker's endpoints for setting up: configuration, sessions, sampling sessions."""

from typing import Any

import httpx
import pytest
from tinker import types
from tinker.types.client_config_response import ClientConfigResponse
from tinker.types.client_dynamic_config_response import ClientDynamicConfigResponse

from gateway_http.settings import GatewaySettings
from headway.reasons import Reason
from tests.gateway.tinker.bodies import Body, refused, sampling_session
from tests.gateway.tinker_fakes import MODEL, ScriptedScheduler, client_of


async def test_dynamic_config_turns_cancelling_on(http: httpx.AsyncClient) -> None:
    answer = (await http.post("client/dynamic_config", json={"sdk_version": "0.38.0"})).json()
    assert ClientDynamicConfigResponse(**answer).sample_cancel_enabled is True


async def test_capabilities_name_the_models(http: httpx.AsyncClient) -> None:
    answer = (await http.get("get_server_capabilities")).json()
    model = types.GetServerCapabilitiesResponse(**answer).supported_models[0]
    assert (model.model_name, model.max_context_length) == (MODEL, 4096)


async def test_sessions_come_and_go(http: httpx.AsyncClient) -> None:
    request = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
    first = types.CreateSessionResponse(**(await http.post("create_session", json=request)).json())
    second = types.CreateSessionResponse(**(await http.post("create_session", json=request)).json())
    assert first.session_id != second.session_id
    # a session from before a restart is as good as any
    beat = await http.post("session_heartbeat", json={"session_id": "from before"})
    assert beat.json()["type"] == "session_heartbeat"
    end = {"reason": {"type": "success"}, "detail": None}
    assert (await http.post(f"sessions/{first.session_id}/finish", json=end)).status_code == 200


async def test_users_are_told_what_operators_want_to_say(scheduler: ScriptedScheduler) -> None:
    async with client_of(scheduler) as http:
        answer = (await http.post("create_session", json={})).json()
        assert not [name for name in answer if "message" in name]
    told = {"info": "All is well.", "warning": "Down at noon.", "error": "Use another."}
    values: dict[str, Any] = {f"tinker_{kind}_message": text for kind, text in told.items()}
    settings = GatewaySettings(**values)
    async with client_of(scheduler, settings=settings) as http:
        answer = types.CreateSessionResponse(**(await http.post("create_session", json={})).json())
    shown = (answer.info_message, answer.warning_message, answer.error_message)
    assert shown == tuple(told.values())


async def test_what_an_sdk_may_do_at_once_is_a_setting(scheduler: ScriptedScheduler) -> None:
    settings = GatewaySettings(tinker_max_outstanding=7, tinker_use_poller=True)
    async with client_of(scheduler, settings=settings) as http:
        answer = ClientConfigResponse(**(await http.post("client/config", json={})).json())
    assert answer.sample_max_concurrent_requests == 7
    assert answer.sample_use_retrieve_futures is True


async def test_telemetry_is_taken_and_dropped(http: httpx.AsyncClient) -> None:
    response = await http.post("telemetry", content=b"x" * 100_000)
    assert response.json() == {"status": "accepted"}


# --- sampling sessions ----------------------------------------------------------------------


async def test_a_sampling_session_for_a_session_that_nobody_created(
    http: httpx.AsyncClient,
) -> None:
    assert await sampling_session(http, session_id="queue_status_1700000000")


async def test_a_sampling_session_asked_for_again_is_the_same(http: httpx.AsyncClient) -> None:
    assert await sampling_session(http, seq=3) == await sampling_session(http, seq=3)
    ids = {await sampling_session(http, name, seq) for name in ("a", "b") for seq in (0, 1)}
    assert len(ids) == 4


async def test_an_unknown_model_is_refused_at_once(http: httpx.AsyncClient) -> None:
    for name in ({"base_model": "other"}, {"model_path": "tinker://run/sampler_weights/x"}):
        body = {"session_id": "s", "sampling_session_seq_id": 0, **name}
        assert (await http.post("create_sampling_session", json=body)).status_code == 404


@pytest.mark.parametrize("why_not", [Reason.NO_CAPACITY, None])
async def test_a_model_that_may_come_back_is_not_called_unknown(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, why_not: Reason | None
) -> None:
    scheduler.models = []
    scheduler.why_not = why_not
    body = {"session_id": "s", "sampling_session_seq_id": 0, "base_model": MODEL}
    response = await http.post("create_sampling_session", json=body)
    assert response.status_code == 503


async def test_a_sampler_tells_its_model(http: httpx.AsyncClient) -> None:
    sampler_id = await sampling_session(http)
    answer = (await http.get(f"samplers/{sampler_id}")).json()
    assert types.GetSamplerResponse(**answer).base_model == MODEL
    assert (await http.get(f"samplers/{sampler_id}x")).status_code == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"sampling_session_seq_id": 0, "base_model": MODEL}, "session_id"),
        ({"session_id": 7, "sampling_session_seq_id": 0, "base_model": MODEL}, "session_id"),
        ({"session_id": "s", "sampling_session_seq_id": "0"}, "sampling_session_seq_id"),
        ({"session_id": "s", "sampling_session_seq_id": 0}, "base_model"),
        ({"session_id": "s" * 257, "sampling_session_seq_id": 0}, "session_id"),
    ],
)
async def test_bad_sampling_sessions_are_refused_by_field(
    http: httpx.AsyncClient, body: Body, field: str
) -> None:
    await refused(http, "create_sampling_session", body, field)


async def test_every_route_has_one_method(http: httpx.AsyncClient) -> None:
    assert (await http.get("asample")).status_code == 405
    assert (await http.delete("healthz")).status_code == 405
