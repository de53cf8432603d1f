"""asample: what reaches the scheduler, what is found again, what is refused."""

from typing import Any

import httpx
import pytest
from tinker import types

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway.tinker.bodies import Body, refused, sample_body, sampling_session
from tests.gateway.tinker_fakes import MODEL, SETTINGS, ScriptedScheduler


def with_params(**params: Any) -> Body:
    return sample_body(sampling_params={"temperature": 1.0, "top_k": -1, "top_p": 1.0, **params})


async def submitted(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, body: Body
) -> generation_pb2.GenerationRequest:
    response = await http.post("asample", json=body)
    assert response.status_code == 200, response.text
    return scheduler.submitted[-1]


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


async def test_a_number_or_key_that_came_before_is_named(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    session = await sampling_session(http)
    scheduler.refusal = HeadwayError(Reason.REQUEST_ID_CONFLICT, "The key is taken.")
    for body, name in (
        (sample_body(), "X-Idempotency-Key"),
        (sample_body(sampling_session_id=session, seq_id=0), "seq_id"),
    ):
        response = await http.post("asample", json=body)
        assert response.status_code == 422
        assert f"a new one needs a new {name}." in response.json()["error"]


async def test_cancelling_is_harmless_and_by_tenant(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    assert (await http.post("cancel_future", json={"request_id": "r"})).status_code == 200
    assert scheduler.cancelled == [("r", "alice")]
    await refused(http, "cancel_future", {"request_id": 1}, "request_id")
