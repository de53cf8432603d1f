"""retrieve_future before there is a result: plain pollers, held ones, no scheduler to ask."""

import asyncio
import math

import httpx
import pytest
from starlette.routing import Router
from starlette.types import Message

from gateway_http import tinker
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_futures import hold_s
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway.tinker.pollers import MINT_SCRIPT, PLAIN, SDK_38, poll
from tests.gateway.tinker_fakes import (
    SETTINGS,
    TWO_SAMPLES,
    KeyIsTenant,
    ScriptedScheduler,
    client_of,
    running,
    waiting,
)

WAIT_S = 60.0


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
    scheduler: ScriptedScheduler,
) -> None:
    scheduler.outcomes = [waiting(3, 4, 1), waiting(2, 4, 1), TWO_SAMPLES]
    async with client_of(scheduler, settings=GatewaySettings(tinker_poll_pause_s=0.01)) as http:
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
