"""retrieve_future: two encodings, every kind of end."""

from typing import Any

import httpx
import pytest
from tinker.proto import tinker_public_pb2
from tinker.proto.response_conv import deserialize_sample_response
from tinker.types.request_failed_response import RequestFailedResponse

from headway.errors import TABLE, HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway.tinker.pollers import MINT_SCRIPT, PLAIN, PROTOBUF, SDK_22, SDK_38, poll
from tests.gateway.tinker_fakes import TWO_SAMPLES, ScriptedScheduler, failure, result

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
