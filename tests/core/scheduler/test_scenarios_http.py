"""Scenarios 6-10, 63, 64, 70, 75, 76: what the gateway answers, over a scripted scheduler.

Executors dial the scheduler, not the gateway: "no live backend" is a scheduler without models.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx

from gateway_http.client import SchedulerClient
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import scheduler_pb2
from tests.gateway import scripted, tinker_fakes, tiny_model
from tests.gateway.conftest import serving, settings_for

CHAT = {"model": tiny_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
KEY = {"Authorization": "Bearer key"}


@contextlib.asynccontextmanager
async def gateway(
    models: list[str], snapshot: scheduler_pb2.Snapshot | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway with one key, whose scheduler has these models and is in this state."""
    scheduler = scripted.ScriptedScheduler()  # type: ignore[abstract]
    scheduler.models = models
    scheduler.snapshot = snapshot or scheduler_pb2.Snapshot()
    scheduler.port = await scheduler.start()
    settings = settings_for(scheduler, api_keys="team=key", signing_key="0123456789abcdef")
    client = SchedulerClient(settings)
    async with (
        client.running(),
        serving(client, settings) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as http,
    ):
        yield http
    await scheduler.stop()


async def test_scenario_06_health_needs_no_key() -> None:
    async with gateway(models=[]) as http:
        assert (await http.get("/health")).status_code == 503


async def test_scenario_07_health_is_the_same_with_a_key() -> None:
    async with gateway(models=[]) as http:
        assert (await http.get("/health", headers=KEY)).status_code == 503
        wrong = {"Authorization": "Bearer wrong"}
        assert (await http.get("/health", headers=wrong)).status_code == 503


async def test_scenario_08_health_is_200_if_anything_is_live() -> None:
    async with gateway(models=[]) as http:
        assert (await http.get("/health")).status_code == 503
    async with gateway(models=["another/model"]) as http:
        assert (await http.get("/health")).status_code == 200


async def test_scenario_09_inference_needs_the_right_key() -> None:
    async with gateway(models=[tiny_model.NAME]) as http:
        for headers, status in (({}, 401), ({"Authorization": "Bearer no"}, 401), (KEY, 200)):
            response = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert response.status_code == status


async def test_scenario_10_only_the_exact_public_paths_pass_without_a_key() -> None:
    """The monitor passes for callers on this machine only (W14), as these are."""
    async with gateway(models=[tiny_model.NAME]) as http:
        for path in ("/health", "/health/", "/monitor", "/monitor/"):
            assert (await http.get(path)).status_code == 200
        for path in ("/monitor/data", "/monitor/data/"):
            assert (await http.get(path)).status_code == 200
            from_afar = await http.get(path, headers={"X-Forwarded-For": "1.2.3.4"})
            assert from_afar.status_code == 403
        for path in ("/monitor/dataX", "/monitorx", "/healthx"):
            assert (await http.get(path)).status_code in (401, 404)


async def monitor_data(snapshot: scheduler_pb2.Snapshot) -> dict[str, Any]:
    """What a gateway's monitor says of a scheduler in this state."""
    async with gateway(models=[tiny_model.NAME], snapshot=snapshot) as http:
        return dict((await http.get("/monitor/data")).json())


async def test_scenario_63_monitor_data_has_all_keys() -> None:
    snapshot = scheduler_pb2.Snapshot()
    snapshot.executors.add(executor_id="b1")
    data = await monitor_data(snapshot)
    assert data.keys() >= {
        *("uptime", "total_requests", "queue_depth", "session_count", "live_backend_count"),
        *("session_hits", "session_misses", "session_hit_rate", "accept_time"),
        *("backends", "queue", "model_stats"),
    }
    (backend,) = data["backends"]
    assert {name for name in backend if name.startswith("stat_")} == {
        *("stat_requests", "stat_share_pct", "stat_utilization_pct"),
        *("stat_avg_duration_s", "stat_affinity"),
    }


async def test_scenario_64_a_row_shows_state_models_and_slots() -> None:
    snapshot = scheduler_pb2.Snapshot()
    states = scheduler_pb2.ExecutorRow
    snapshot.executors.add(
        executor_id="b1",
        state=states.STATE_ATTACHED,
        num_slots=4,
        num_free=3,
        num_leased=1,
        resident_models=["C", "B", "A"],
        held_models=["B"],
        active_models=["A"],
    )
    snapshot.executors.add(executor_id="b2", state=states.STATE_LOST, num_slots=2, num_free=2)
    live, lost = (await monitor_data(snapshot))["backends"]
    assert (live["url"], live["live"], lost["live"]) == ("b1", True, False)
    assert (live["models"], live["active_models"]) == (["A", "B", "C"], ["A"])
    assert (live["slots_acquired"], live["slots_total"]) == (1, 4)
    assert (lost["slots_acquired"], lost["slots_total"], lost["active_models"]) == (0, 2, [])


async def test_scenario_70_names_are_escaped() -> None:
    """Data are JSON; the page, which test_monitor reads, makes text of whatever they hold."""
    snapshot = scheduler_pb2.Snapshot()
    snapshot.queue.add(request_id="<b>", model="<script>", session_id='"><img>')
    async with gateway(models=[], snapshot=snapshot) as http:
        response = await http.get("/monitor/data")
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.json()["queue"][0]["model"] == "<script>"
        page = (await http.get("/monitor")).text
        assert "textContent" in page
        for maker_of_markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"):
            assert maker_of_markup not in page


async def poll(
    scheduler: tinker_fakes.ScriptedScheduler, request_id: str = "r", **headers: str
) -> httpx.Response:
    async with tinker_fakes.client_of(scheduler) as http:
        body = {"request_id": request_id, "allow_metadata_only": True}
        return await http.post("retrieve_future", json=body, headers=headers)


async def test_scenario_75_a_plain_poller_sees_its_position_count_down() -> None:
    """The header X-Tinker-Sampling-Backpressure asks for what every plain poller is told."""
    scheduler = tinker_fakes.ScriptedScheduler()
    scheduler.outcomes = [tinker_fakes.waiting(n, 3, 2.0 * (n + 1)) for n in (2, 1, 0)]
    scheduler.outcomes.append(tinker_fakes.result(([5], [-0.5])))
    header = {"X-Tinker-Sampling-Backpressure": "1"}
    positions = []
    for _ in range(3):
        response = await poll(scheduler, **header)
        body = response.json()
        assert response.status_code == 408
        assert body["request_id"] == "r"
        assert {"type", "status", "queue_state", "queue_state_reason", "queue_depth"} <= body.keys()
        assert {"estimated_wait_s", "retry_after_s", "progress"} <= body.keys()
        assert int(response.headers["Retry-After"]) >= 1
        for name in ("Depth", "Position", "ETA-S", "Status"):
            assert response.headers[f"X-Queue-{name}"]
        positions.append(body["queue_position"])
    assert positions == [2, 1, 0]
    response = await poll(scheduler, **header)
    assert (response.status_code, response.json()["request_id"]) == (200, "r")
    for reason, status in ((Reason.REQUEST_NOT_FOUND, 404), (Reason.RESULT_EXPIRED, 410)):
        scheduler.outcomes = [HeadwayError(reason, "Gone.")]
        assert (await poll(scheduler, **header)).status_code == status


async def test_scenario_76_without_the_header_the_poll_is_held() -> None:
    """The SDK's own poller, told by its request type; the scheduler holds it, not a loop here."""
    sdk = {"X-Tinker-Request-Type": "Sample", "x-stainless-read-timeout": "45.0"}
    scheduler = tinker_fakes.ScriptedScheduler()
    scheduler.outcomes = [tinker_fakes.waiting(1, 2, 2.0)]
    assert (await poll(scheduler, **sdk)).status_code == 408
    assert scheduler.waits_s[0] > 29
    scheduler.waits_s.clear()
    outage = HeadwayError(Reason.NOT_LEADER, "Not me.", retry_after_ms=20)
    scheduler.outcomes = [outage]
    sdk["x-stainless-read-timeout"] = "0.1"
    response = await asyncio.wait_for(poll(scheduler, **sdk), 5)
    assert response.status_code == 408
    assert len(scheduler.waits_s) < 10
