"""The set-up routes and asample, handler by handler."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tinker import types
from tinker.types.auth_token_response import AuthTokenResponse
from tinker.types.client_config_response import ClientConfigResponse
from tinker.types.client_dynamic_config_response import ClientDynamicConfigResponse

from gateway_http.settings import GatewaySettings
from gateway_http.tinker_tokens import Signer
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway.tinker_fakes import MODEL, SETTINGS, ScriptedScheduler, client_of

Body = dict[str, Any]


@pytest.fixture
def scheduler() -> ScriptedScheduler:
    return ScriptedScheduler()


@pytest.fixture
async def http(scheduler: ScriptedScheduler) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(scheduler) as client:
        yield client


async def sampling_session(http: httpx.AsyncClient, session_id: str = "mine", seq: int = 0) -> str:
    body = {"session_id": session_id, "sampling_session_seq_id": seq, "base_model": MODEL}
    response = await http.post("create_sampling_session", json=body)
    assert response.status_code == 200
    return types.CreateSamplingSessionResponse(**response.json()).sampling_session_id


def sample_body(**changes: Any) -> Body:
    body = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {"temperature": 1.0, "top_k": -1, "top_p": 1.0},
        "num_samples": 1,
        "base_model": MODEL,
        "type": "sample",
    }
    return {**body, **changes}


def with_params(**params: Any) -> Body:
    return sample_body(sampling_params={"temperature": 1.0, "top_k": -1, "top_p": 1.0, **params})


async def submitted(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, body: Body
) -> generation_pb2.GenerationRequest:
    response = await http.post("asample", json=body)
    assert response.status_code == 200, response.text
    return scheduler.submitted[-1]


async def refused(http: httpx.AsyncClient, path: str, body: Any, field: str) -> httpx.Response:
    """It is a 400 with a body, its length, and the field's name in it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await http.post(path, content=content)
    assert response.status_code == 400, response.text
    assert int(response.headers["content-length"]) == len(response.content) > 0
    assert field in response.text
    return response


# --- who is there ---------------------------------------------------------------------------


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
    forged = Signer(SETTINGS.signing_secret()).jwt("somebody", time.time())
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


# --- set-up ---------------------------------------------------------------------------------


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


# --- asample --------------------------------------------------------------------------------


async def test_a_whole_request_reaches_the_scheduler(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    session = await sampling_session(http)
    body = with_params(temperature=0, top_k=5, top_p=0.5, max_tokens=7, seed=9, stop=[3])
    del body["base_model"]
    body |= {
        "sampling_session_id": session,
        "seq_id": 10**18 + 1,
        "num_samples": 2,
        "prompt": {"chunks": [{"tokens": [1, 2]}, {"type": "encoded_text", "tokens": [3]}]},
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "record_stability_info": True,
        "a_field_of_tomorrow": {"x": [1]},
    }
    request = await submitted(http, scheduler, body)
    expected = generation_pb2.GenerationRequest(
        model=MODEL,
        prompt_token_ids=[1, 2, 3],
        sampling=generation_pb2.SamplingParams(
            temperature=0,
            top_k=5,
            top_p=0.5,
            max_tokens=7,
            seed=9,
            stop_token_ids=[3],
            logprobs=True,
        ),
        num_samples=2,
        tenant="alice",
        idempotency_key=f"tinker:{session.split('.')[1]}:{10**18 + 1}",
    )
    expected.group = f"tinker:{session.split('.')[1]}:{10**9}"
    expected.queue_timeout.FromMilliseconds(int(SETTINGS.tinker_queue_timeout_s * 1000))
    expected.abandon_after.FromMilliseconds(int(SETTINGS.tinker_abandon_after_s * 1000))
    assert request == expected


async def test_a_resent_sample_gets_the_same_ids(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    session = await sampling_session(http)
    answers = []
    for seq_id, key in ((0, "k1"), (0, "k2"), (1, "k3")):
        body = sample_body(sampling_session_id=session, seq_id=seq_id, num_samples=3)
        headers = {"X-Idempotency-Key": key}
        response = await http.post("asample", json=body, headers=headers)
        answers.append(types.UntypedAPIFuture(**response.json()))
    assert answers[0] == answers[1] != answers[2]
    ids = answers[0].sample_sequence_ids
    assert ids is not None
    assert len(set(ids)) == 3


async def test_long_names_make_no_long_keys(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    session = await sampling_session(http, session_id="s" * 256, seq=2**63 - 1)
    body = sample_body(sampling_session_id=session, seq_id=2**63 - 1)
    assert len((await submitted(http, scheduler, body)).idempotency_key) < 64


async def test_without_a_sampling_session_the_header_finds_a_resent_sample(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    for key in ("k", "k", None):
        headers = {"X-Idempotency-Key": key} if key else {}
        await http.post("asample", json=sample_body(), headers=headers)
    assert [x.idempotency_key for x in scheduler.submitted] == ["tinker:k", "tinker:k", ""]


async def test_what_is_left_out_stays_unset(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    sampling = (await submitted(http, scheduler, sample_body())).sampling
    assert not sampling.HasField("max_tokens")
    assert not sampling.HasField("seed")
    assert sampling.top_k == 0


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, generation_pb2.SamplingParams()),
        ([], generation_pb2.SamplingParams(ignore_eos=True)),
        ([3, 4], generation_pb2.SamplingParams(stop_token_ids=[3, 4])),
        ("end", generation_pb2.SamplingParams(stop_strings=["end"])),
        (["a", "b"], generation_pb2.SamplingParams(stop_strings=["a", "b"])),
    ],
)
async def test_forms_of_stop(
    http: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    stop: Any,
    expected: generation_pb2.SamplingParams,
) -> None:
    sampling = (await submitted(http, scheduler, with_params(stop=stop))).sampling
    assert sampling.ignore_eos == expected.ignore_eos
    assert sampling.stop_token_ids == expected.stop_token_ids
    assert sampling.stop_strings == expected.stop_strings


async def test_any_int_names_a_seed(http: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    assert (await submitted(http, scheduler, with_params(seed=-1))).sampling.seed == 2**64 - 1
    assert (await submitted(http, scheduler, with_params(seed=2**63))).sampling.seed == 2**63


@pytest.mark.parametrize("kind", ["image", "image_asset_pointer", "dmel", "smell"])
async def test_other_chunks_than_text_are_refused_by_type(
    http: httpx.AsyncClient, kind: str
) -> None:
    chunk = {"type": kind, "data": "aGk=", "format": "png"}
    body = sample_body(prompt={"chunks": [{"tokens": [1]}, chunk]})
    response = await refused(http, "asample", body, f"'{kind}'")
    assert response.json()["error"].startswith("prompt.chunks[1]: ")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (sample_body(prompt=None), "prompt"),
        (sample_body(prompt={"chunks": []}), "prompt"),
        (sample_body(prompt={"chunks": [{"tokens": []}]}), "prompt"),
        (sample_body(prompt={"chunks": [{"type": "encoded_text"}]}), "prompt.chunks[0].tokens"),
        (sample_body(prompt={"chunks": [{"tokens": [-1]}]}), "prompt.chunks[0].tokens[0]"),
        (sample_body(prompt={"chunks": [{"tokens": [2**31]}]}), "prompt.chunks[0].tokens[0]"),
        (sample_body(prompt={"chunks": [{"tokens": "1"}]}), "prompt.chunks[0].tokens"),
        (sample_body(num_samples=0), "num_samples"),
        (sample_body(num_samples=10**6), "num_samples"),
        (sample_body(num_samples=True), "num_samples"),
        (sample_body(seq_id=2**63, sampling_session_id="x"), "seq_id"),
        (sample_body(seq_id=-1), "seq_id"),
        (sample_body(base_model=None), "base_model"),
        (sample_body(base_model=""), "base_model"),
        (sample_body(prompt_logprobs_last_n=0), "prompt_logprobs_last_n"),
        (with_params(temperature=-0.5), "sampling_params.temperature"),
        (with_params(temperature="hot"), "sampling_params.temperature"),
        (with_params(top_k=-2), "sampling_params.top_k"),
        (with_params(top_p=0), "sampling_params.top_p"),
        (with_params(top_p=1.5), "sampling_params.top_p"),
        (with_params(max_tokens=0), "sampling_params.max_tokens"),
        (with_params(seed=1.5), "sampling_params.seed"),
        (with_params(stop=""), "sampling_params.stop"),
        (with_params(stop=["a", 1]), "sampling_params.stop"),
        (with_params(stop=[None]), "sampling_params.stop[0]"),
        (with_params(stop=["x"] * 17), "sampling_params.stop"),
        (with_params(stop="x" * 257), "sampling_params.stop"),
        (with_params(stop=list(range(17))), "sampling_params.stop"),
        (with_params(stop={"a": 1}), "sampling_params.stop"),
    ],
)
async def test_bad_samples_are_refused_by_field(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, body: Body, field: str
) -> None:
    await refused(http, "asample", body, field)
    assert scheduler.submitted == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'"text"',
        b'{"prompt": NaN}',
        b'{"base_model": "\xff"}',
        b'{"base_model": "\\ud800"}',
        b'{"sampling_params": {"temperature": 1e999}}',
        b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"x": ' * 200_000,
    ],
    ids=range(11),
)
async def test_hostile_bodies_are_refused(http: httpx.AsyncClient, body: bytes) -> None:
    for path in ("asample", "create_sampling_session", "retrieve_future", "cancel_future"):
        await refused(http, path, body, "")


async def test_a_sampling_session_needs_a_number_and_our_signature(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    session = await sampling_session(http)
    await refused(http, "asample", sample_body(sampling_session_id=session), "seq_id")
    for forged in ("x", "", "a.b", session[1:], session[:-4], "\u00e9." + session):
        body = sample_body(sampling_session_id=forged, seq_id=0)
        response = await http.post("asample", json=body)
        assert response.status_code == 404
    assert scheduler.submitted == []


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.PROMPT_TOO_LONG, 400),
        (Reason.MODEL_NOT_FOUND, 404),
        (Reason.REQUEST_ID_CONFLICT, 422),
        (Reason.QUEUE_FULL, 429),
        (Reason.NO_CAPACITY, 503),
    ],
)
async def test_the_schedulers_refusals_surface_on_asample(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, reason: Reason, status: int
) -> None:
    scheduler.refusal = HeadwayError(reason, "No.", retry_after_ms=1500)
    response = await http.post("asample", json=sample_body())
    assert response.status_code == status
    assert int(response.headers["content-length"]) > 0
    assert (status in (429, 503)) == ("retry-after" in response.headers)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("sampling.stop_strings: at most 3", "sampling_params.stop: at most 3"),
        ("prompt_token_ids: must be below 9", "prompt: must be below 9"),
        ("prompt_scoring.num_alternatives: no", "prompt_alt_tokens_k: no"),
        ("prompt_scoring.target_token_ids[3]: no", "target_prompt_logprobs: no"),
        ("idempotency_key: must be printable", "X-Idempotency-Key: must be printable"),
        ("tenant: no", "tenant: no"),
        ("Something else.", "Something else."),
    ],
)
async def test_refusals_name_what_the_client_sent(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, message: str, told: str
) -> None:
    scheduler.refusal = HeadwayError(Reason.INVALID_REQUEST, message)
    response = await http.post("asample", json=sample_body())
    assert (response.status_code, response.json()["error"]) == (400, told)


async def test_cancelling_is_harmless_and_by_tenant(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    assert (await http.post("cancel_future", json={"request_id": "r"})).status_code == 200
    assert scheduler.cancelled == [("r", "alice")]
    await refused(http, "cancel_future", {"request_id": 1}, "request_id")


async def test_every_route_has_one_method(http: httpx.AsyncClient) -> None:
    assert (await http.get("asample")).status_code == 405
    assert (await http.delete("healthz")).status_code == 405
