"""retrieve_future: two kinds of poller, two encodings, every kind of end."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.routing import Router
from starlette.types import Message
from tinker.proto import tinker_public_pb2
from tinker.proto.response_conv import deserialize_sample_response
from tinker.types.request_failed_response import RequestFailedResponse

from gateway_http import tinker, tinker_polls
from gateway_http.tinker_futures import hold_s
from headway.errors import TABLE, HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway.tinker_fakes import (
    SETTINGS,
    KeyIsTenant,
    ScriptedScheduler,
    client_of,
    failure,
    result,
    running,
    waiting,
)

PROTOBUF = "application/x-protobuf"
# as the clients send them
SDK_38 = {
    "X-Tinker-Request-Type": "Sample",
    "X-Tinker-Request-Iteration": "0",
    "X-Stainless-Raw-Response": "raw",
    "x-stainless-read-timeout": "45.0",
    "Accept": PROTOBUF,
}
SDK_22 = {**SDK_38, "Accept": f"{PROTOBUF}, application/json"}
MINT_SCRIPT = {"X-Stainless-Raw-Response": "raw", "Accept": "application/json"}
PLAIN = {"Accept": "application/json"}

WAIT_S = 60.0
TWO_SAMPLES = result(([5, 2**31 - 1], [-0.5, -1.25]), ([6], [0.0]))


@pytest.fixture
def scheduler() -> ScriptedScheduler:
    return ScriptedScheduler()


@pytest.fixture
async def http(scheduler: ScriptedScheduler) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(scheduler) as client:
        yield client


async def poll(http: httpx.AsyncClient, headers: dict[str, str]) -> httpx.Response:
    body = {"request_id": "r", "allow_metadata_only": True}
    return await http.post("retrieve_future", json=body, headers=headers)


# --- results --------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [SDK_38, SDK_22], ids=["0.38", "0.22"])
async def test_the_protobuf_result_is_byte_for_byte_the_sdks_own(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, headers: dict[str, str]
) -> None:
    scheduler.outcomes = [TWO_SAMPLES]
    response = await poll(http, headers)
    assert response.headers["content-type"] == PROTOBUF
    expected = tinker_public_pb2.SampleResponse()
    expected.sequences.add(
        stop_reason=tinker_public_pb2.STOP_REASON_STOP,
        tokens=bytes([5, 0, 0, 0, 255, 255, 255, 127]),
        logprobs=bytes([0, 0, 0, 191, 0, 0, 160, 191]),
    )
    expected.sequences.add(
        stop_reason=tinker_public_pb2.STOP_REASON_STOP,
        tokens=bytes([6, 0, 0, 0]),
        logprobs=bytes(4),
    )
    assert response.content == expected.SerializeToString()
    read = deserialize_sample_response(response.content)
    assert [x.tokens for x in read.sequences] == [[5, 2**31 - 1], [6]]
    assert [x.logprobs for x in read.sequences] == [[-0.5, -1.25], [0.0]]


async def test_the_json_result(http: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.outcomes = [TWO_SAMPLES]
    answer = (await poll(http, MINT_SCRIPT)).json()
    assert list(answer)[:2] == ["sequences", "request_id"]
    # in a 200 the SDK takes these for something else than a result
    assert "error" not in answer
    assert answer["type"] == "sample"
    assert "status" not in answer
    assert answer["request_id"] == "r"
    assert answer["sequences"] == [
        {"tokens": [5, 2**31 - 1], "logprobs": [-0.5, -1.25], "stop_reason": "stop"},
        {"tokens": [6], "logprobs": [0.0], "stop_reason": "stop"},
    ]


async def test_an_end_by_length(http: httpx.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.outcomes = [result(([5], [-1.0]), reason=generation_pb2.FINISH_REASON_LENGTH)]
    assert (await poll(http, PLAIN)).json()["sequences"][0]["stop_reason"] == "length"
    read = deserialize_sample_response((await poll(http, SDK_38)).content)
    assert read.sequences[0].stop_reason == "length"


async def test_reading_consumes_nothing_and_asks_for_the_callers_own(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.outcomes = [TWO_SAMPLES]
    contents = {(await poll(http, SDK_38)).content for _ in range(3)}
    assert len(contents) == 1
    assert scheduler.retrieved == [("r", "alice")] * 3


async def test_without_logprobs_there_is_none_instead_of_an_empty_list(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.outcomes = [result(([5], []))]
    assert (await poll(http, PLAIN)).json()["sequences"][0]["logprobs"] is None
    read = deserialize_sample_response((await poll(http, SDK_38)).content)
    assert read.sequences[0].logprobs is None


# --- failures -------------------------------------------------------------------------------

USER_REASONS = {
    Reason.INVALID_REQUEST,
    Reason.PROMPT_TOO_LONG,
    Reason.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED,
    Reason.MODEL_NOT_FOUND,
    Reason.REQUEST_NOT_FOUND,
    Reason.REQUEST_ID_CONFLICT,
    Reason.RESULT_EXPIRED,
    Reason.BODY_TOO_LARGE,
    Reason.CANCELLED,
    Reason.STALE_LEASE,
}


@pytest.mark.parametrize("reason", TABLE)
@pytest.mark.parametrize("headers", [SDK_38, SDK_22, MINT_SCRIPT, PLAIN])
async def test_a_failed_request_is_a_200_with_a_category(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, headers: dict[str, str], reason: Reason
) -> None:
    scheduler.outcomes = [failure(reason, "It failed.")]
    response = await poll(http, headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    read = RequestFailedResponse(**response.json())
    assert read.error == "It failed."
    assert read.category.value == ("user" if reason in USER_REASONS else "server")


async def test_a_reason_of_a_newer_scheduler_is_the_servers_fault(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    unknown = generation_pb2.Failure(reason="TOMORROWS_REASON", message="It failed.")
    scheduler.outcomes = [generation_pb2.GenerationResult(failure=unknown)]
    assert (await poll(http, SDK_38)).json()["category"] == "server"


@pytest.mark.parametrize(
    ("reason", "status"), [(Reason.REQUEST_NOT_FOUND, 404), (Reason.RESULT_EXPIRED, 410)]
)
async def test_what_is_not_there_is_an_error_at_once(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, reason: Reason, status: int
) -> None:
    scheduler.outcomes = [HeadwayError(reason, "Gone.")]
    # the SDK takes a 404 for fatal, and samples anew after a 410
    for headers, told in ((SDK_38, 410), (SDK_22, 410), (MINT_SCRIPT, status), (PLAIN, status)):
        response = await poll(http, headers)
        assert (response.status_code, response.headers["x-should-retry"]) == (told, "false")
        assert int(response.headers["content-length"]) > 0
    assert len(scheduler.waits_s) == 4


@pytest.mark.parametrize(
    "body", [{}, {"request_id": 1}, {"request_id": ""}, {"request_id": "x" * 257}]
)
async def test_bad_polls_are_refused_by_field(http: httpx.AsyncClient, body: Any) -> None:
    response = await http.post("retrieve_future", json=body, headers=SDK_38)
    assert response.status_code == 400
    assert "request_id" in response.text


# --- the plain poller -----------------------------------------------------------------------


async def test_the_plain_408_has_every_key_and_header(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.outcomes = [waiting(11, 261, 9.25, retry_after_s=9.25)]
    response = await poll(http, MINT_SCRIPT)
    assert response.status_code == 408
    assert response.json() == {
        "request_id": "r",
        "type": "pending",
        "status": "queued",
        "queue_state": "waiting",
        "queue_state_reason": "position 12 of 261, about 10 s",
        "queue_position": 11,
        "queue_depth": 261,
        "estimated_wait_s": 9.25,
        "progress": {"num_generated_tokens": 0},
        "retry_after_s": 3.0,
    }
    assert int(response.headers["content-length"]) == len(response.content)
    assert {
        name: response.headers[name] for name in response.headers if name != "content-type"
    } == {
        "content-length": str(len(response.content)),
        "retry-after": "3",
        "x-queue-depth": "261",
        "x-queue-position": "11",
        "x-queue-eta-s": "9.25",
        "x-queue-status": "waiting",
        "x-should-retry": "false",
    }
    assert scheduler.waits_s == [0]


async def test_the_plain_408_of_a_running_request(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.outcomes = [running(4.0, num_generated_tokens=33)]
    response = await poll(http, PLAIN)
    body = response.json()
    assert (body["status"], body["queue_state"], body["queue_position"]) == (
        "queued",
        "processing",
        0,
    )
    assert body["progress"] == {"num_generated_tokens": 33}
    # a plain retrieve() counts on the retries of its base client
    assert "x-should-retry" not in response.headers


async def test_an_unknown_wait_is_not_invented(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.outcomes = [waiting(0, 0, None)]
    response = await poll(http, PLAIN)
    assert response.json()["estimated_wait_s"] is None
    assert response.json()["queue_state_reason"] == "position 1 of 1"
    assert "x-queue-eta-s" not in response.headers


@pytest.mark.parametrize(
    ("wish", "told"), [(0, "1"), (4, "1"), (4.1, "2"), (40, "10"), (240, "60"), (4000, "60")]
)
async def test_a_plain_poller_asks_a_few_times_in_a_wait(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, wish: float, told: str
) -> None:
    scheduler.outcomes = [waiting(1, 2, 3, retry_after_s=wish)]
    assert (await poll(http, PLAIN)).headers["retry-after"] == told


# --- the SDK's poller -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        (waiting(11, 261, 30), "paused_capacity", "position 12 of 261, about 30 s"),
        (waiting(11, 261, None), "paused_capacity", "position 12 of 261"),
        (waiting(0, 1, 10), "paused_capacity", "position 1 of 1, about 10 s"),
        (waiting(0, 1, 9.5), "active", "position 1 of 1, about 10 s"),
        (waiting(0, 1, 0), "active", "position 1 of 1, about 0 s"),
        (running(900, 5), "active", None),
    ],
)
async def test_the_sdk_hears_its_own_words(
    http: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    status: generation_pb2.QueueStatus,
    state: str,
    reason: str | None,
) -> None:
    scheduler.outcomes = [status]
    response = await poll(http, {**SDK_38, "x-stainless-read-timeout": "0.1"})
    assert response.status_code == 408
    assert response.json() == {
        "type": "try_again",
        "request_id": "r",
        "queue_state": state,
        "queue_state_reason": reason,
    }
    assert "x-should-retry" not in response.headers


@pytest.mark.parametrize(
    ("read_timeout", "expected_s"),
    [
        ("45.0", 30),
        ("60", 30),
        ("25", 15),
        ("12", 6),
        ("0.5", 0.25),
        (None, 30),
        ("0", 30),
        ("-1", 30),
        ("nan", 30),
        ("inf", 30),
        ("soon", 30),
    ],
)
def test_how_long_a_poll_is_held(read_timeout: str | None, expected_s: float) -> None:
    headers = {} if read_timeout is None else {"x-stainless-read-timeout": read_timeout}
    assert hold_s(headers, 30) == expected_s


async def test_the_scheduler_holds_the_sdks_poll(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.outcomes = [TWO_SAMPLES]
    await poll(http, {**SDK_38, "x-stainless-read-timeout": "20"})
    assert math.isclose(scheduler.waits_s[0], 10, abs_tol=0.5)


async def test_a_scheduler_with_too_many_waiters_makes_no_storm(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinker_polls, "_EARLY_PAUSE_S", 0.01)
    scheduler.outcomes = [waiting(3, 4, 1), waiting(2, 4, 1), TWO_SAMPLES]
    assert (await poll(http, SDK_38)).status_code == 200
    assert len(scheduler.waits_s) == 3
    assert scheduler.waits_s[2] <= scheduler.waits_s[0] - 0.02


async def test_nobody_is_held_by_a_gateway_that_shuts_down(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.holds = True
    scheduler.outcomes = [waiting(3, 4, 1)]
    held = asyncio.create_task(poll(http, SDK_38))
    await scheduler.is_holding.wait()
    scheduler.draining.set()
    response = await asyncio.wait_for(held, WAIT_S)
    assert response.status_code == 408
    assert response.json()["queue_state_reason"] == "position 4 of 4, about 1 s"


async def test_nobody_is_held_who_has_hung_up(scheduler: ScriptedScheduler) -> None:
    scheduler.holds = True
    scheduler.outcomes = [waiting(3, 4, 1)]
    inbox = [b'{"request_id": "r"}']
    is_gone = asyncio.Event()

    async def receive() -> Message:
        if inbox:
            return {"type": "http.request", "body": inbox.pop(), "more_body": False}
        await is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        """Nobody reads it."""

    headers = [(b"x-tinker-request-type", b"Sample"), (b"x-api-key", b"tml-alice")]
    path = "/api/v1/retrieve_future"
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    app = Router(tinker.routes(scheduler, SETTINGS, KeyIsTenant()))  # type: ignore[arg-type]
    held = asyncio.create_task(app({**scope, "query_string": b""}, receive, send))
    await scheduler.is_holding.wait()
    is_gone.set()
    await asyncio.wait_for(held, WAIT_S)


# --- a scheduler that cannot be asked -------------------------------------------------------


async def test_an_outage_is_held_like_any_wait(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    gone = HeadwayError(Reason.NO_CAPACITY, "Not there.", retry_after_ms=1)
    scheduler.outcomes = [gone, gone, TWO_SAMPLES]
    assert (await poll(http, SDK_38)).status_code == 200
    assert len(scheduler.waits_s) == 3
    assert scheduler.waits_s == sorted(scheduler.waits_s, reverse=True)


async def test_a_long_outage_is_a_408_and_never_a_storm_of_5xx(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.outcomes = [HeadwayError(Reason.NOT_LEADER, "Not me.", retry_after_ms=200)]
    response = await poll(http, {**SDK_38, "x-stainless-read-timeout": "1"})
    assert response.status_code == 408
    assert response.json()["queue_state"] == "paused_capacity"
    assert "scheduler" in response.json()["queue_state_reason"]
    assert 2 <= len(scheduler.waits_s) <= 5


async def test_a_plain_poller_is_told_of_an_outage_at_once(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.outcomes = [HeadwayError(Reason.DRAINING, "Going.", retry_after_ms=5000)]
    response = await poll(http, MINT_SCRIPT)
    assert response.status_code == 408
    assert scheduler.waits_s == [0]
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["queue_position"] is None
    assert "x-queue-position" not in response.headers
