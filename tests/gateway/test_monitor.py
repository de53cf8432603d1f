"""The monitor: what it says, who may see it, what it costs; and the metrics beside it."""

import asyncio
import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from gateway_http.keys import Scope, entry_text, new_key
from gateway_http.metrics import fleet_text
from gateway_http.monitor.data import MonitorData, view
from gateway_http.monitor.routes import Watch
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import scheduler_pb2
from tests.gateway.conftest import serving, settings_for
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.turns import turns_during

PEPPER = "a pepper for tests, long enough"
SIGNING_KEY = "a signing key for tests"
ROUTES = ("/monitor/data", "/monitor/data/", "/metrics")
NAMES = {
    *("uptime", "total_requests", "queue_depth", "session_count", "live_backend_count"),
    *("session_hits", "session_misses", "session_hit_rate", "accept_time", "backends", "queue"),
    *("model_stats",),
}
NUM_ROWS = 1_000
MOST_ROWS_AT_ONCE = 250  # some 2 ms
STATS = {"requests", "share_pct", "utilization_pct", "avg_duration_s", "affinity"}


def snapshot() -> scheduler_pb2.Snapshot:
    """Two executors, one of them lost, and one waiting request."""
    found = scheduler_pb2.Snapshot(num_waiting=7, num_running=3, decisions={"admitted": 12})
    one = found.executors.add(
        executor_id="executor-1",
        state=scheduler_pb2.ExecutorRow.STATE_ATTACHED,
        num_slots=8,
        num_free=5,
        num_leased=2,
        num_in_doubt=1,
        resident_models=["b", "a", "held"],
        held_models=["held"],
        active_models=["b", "a"],
        max_models=3,
    )
    one.stats.num_leases = 9
    one.stats.share = 0.751
    one.stats.utilisation = 0.12345
    one.stats.mean_duration.FromMilliseconds(1_234)
    one.stats.affinity = 0.5
    one.reservation.model = "cold"
    one.reservation.reason = "time_slice"
    one.reservation.age.FromMilliseconds(1_500)
    one.reservation.remaining.FromMilliseconds(60_000)
    found.executors.add(
        executor_id="<img src=x>", state=scheduler_pb2.ExecutorRow.STATE_LOST, num_slots=2
    )
    row = found.queue.add(
        request_id="req_0123456789abcdef",
        model="<script>alert(1)</script>",
        tenant="team",
        session_id="session-0123456789",
        priority=1.23456,
        band=1,
    )
    row.waited.FromMilliseconds(2_500)
    row.status.position = 4
    row.status.estimated_wait.FromMilliseconds(9_000)
    row.num_tokens = 321
    found.uptime.FromMilliseconds(61_500)
    found.sessions.num_tracked = 5
    found.sessions.num_hits = 2
    found.sessions.num_misses = 1
    found.models.add(
        model="a", num_requests=9, num_tokens=900, num_sessions=4, num_waiting=7, num_homes=1
    )
    broken = found.models.add(model="b").load_failure
    broken.message, broken.num_executors = "a file is cut short", 2
    broken.refused_for.FromMilliseconds(1_500)
    found.queue_wait.p10.FromMilliseconds(100)
    found.queue_wait.mean.FromMilliseconds(550)
    found.queue_wait.p90.FromMilliseconds(900)
    found.queue_wait.num_samples = 10
    return found


class Counted:
    """Stands in for the client's call to the scheduler."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.error: HeadwayError | None = None

    async def __call__(self) -> scheduler_pb2.Snapshot:
        self.num_calls += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return snapshot()


@pytest.fixture
def asked(client: SchedulerClient, monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(client, "snapshot", counted)
    return counted


@pytest.fixture
async def http(
    client: SchedulerClient, settings: GatewaySettings, asked: Counted
) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(client, settings) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


async def test_a_snapshot_becomes_rows() -> None:
    data: dict[str, Any] = msgspec.to_builtins(await view(snapshot()))
    assert data.keys() >= NAMES
    assert (data["total_requests"], data["queue_depth"], data["live_backend_count"]) == (12, 7, 1)
    assert data["accept_time"] == {"p10": 0.1, "mean": 0.55, "p90": 0.9, "sample_count": 10}
    one, lost = data["backends"]
    assert {key.removeprefix("stat_") for key in one if key.startswith("stat_")} == STATS
    assert (one["url"], one["live"], one["state"]) == ("executor-1", True, "attached")
    assert (one["active_models"], one["models"]) == (["a", "b"], ["a", "b", "held"])
    assert (one["slots_acquired"], one["slots_total"]) == (3, 8)
    assert (one["stat_share_pct"], one["stat_utilization_pct"]) == (75, 12.3)
    assert (one["stat_avg_duration_s"], one["stat_affinity"]) == (1.23, 50)
    reservation = {"model": "cold", "reason": "time_slice", "age_s": 1.5, "remaining_s": 60.0}
    assert one["reservation"] == reservation
    assert (lost["live"], lost["state"], lost["active_models"]) == (False, "lost", [])
    assert lost["stat_share_pct"] is None
    (row,) = data["queue"]
    assert row["request_id"] == "req_01234567"
    assert (row["session_id"], row["tenant"], row["priority"]) == ("session-", "team", 1.235)
    assert (row["age_s"], row["position"], row["eta_s"]) == (2.5, 4, 9.0)
    assert row["estimated_tokens"] == 321
    assert (data["uptime"], data["session_count"], data["session_hit_rate"]) == (61.5, 5, 67)
    assert (data["session_hits"], data["session_misses"]) == (2, 1)
    assert data["model_stats"] == {
        "a": {
            "requests": 9,
            "estimated_tokens": 900,
            "tracked_sessions": 4,
            "waiting": 7,
            "running": 0,
            "homes": 1,
            "load_failure": None,
        },
        "b": {
            **dict.fromkeys(("requests", "estimated_tokens", "tracked_sessions"), 0),
            **dict.fromkeys(("waiting", "running", "homes"), 0),
            "load_failure": {"message": "a file is cut short", "executors": 2, "refused_s": 1.5},
        },
    }


async def test_the_queue_is_shown_by_position() -> None:
    found = scheduler_pb2.Snapshot()
    for number in (2, 0, 1, 0):
        found.queue.add(request_id=f"{number}").status.position = number
    assert [row.position for row in (await view(found)).queue] == [0, 0, 1, 2]


async def test_an_empty_snapshot_has_nulls_and_no_rows() -> None:
    data = await view(scheduler_pb2.Snapshot())
    assert (data.accept_time, data.backends, data.queue, data.model_stats) == (None, [], [], {})
    assert (data.session_hit_rate, data.uptime) == (None, 0)


def large_snapshot() -> scheduler_pb2.Snapshot:
    found = scheduler_pb2.Snapshot()
    for number in range(NUM_ROWS):
        found.executors.add(executor_id=f"executor-{number}", num_slots=number)
        found.queue.add().status.position = number
        found.models.add(model=f"model-{number}")
    return found


async def test_streams_go_on_while_a_large_fleet_is_shown() -> None:
    num_turns, data = await turns_during(view(large_snapshot()))
    assert [one.url for one in data.backends] == [f"executor-{n}" for n in range(NUM_ROWS)]
    assert [row.position for row in data.queue] == list(range(NUM_ROWS))
    assert list(data.model_stats) == [f"model-{n}" for n in range(NUM_ROWS)]
    assert num_turns >= 3 * NUM_ROWS // MOST_ROWS_AT_ONCE


async def test_streams_go_on_while_a_large_fleet_is_scraped() -> None:
    data = await view(large_snapshot())
    num_turns, text = await turns_during(fleet_text(data))
    assert num_turns >= 2 * NUM_ROWS // MOST_ROWS_AT_ONCE
    families = {one.name: one for one in text_string_to_metric_families(text.decode())}
    assert text.count(b"# TYPE") == len(families), "each is described once"
    assert [one.labels["executor"] for one in families["headway_executor_live"].samples] == [
        f"executor-{number}" for number in range(NUM_ROWS)
    ]
    slots = families["headway_executor_slots"].samples
    assert [one.value for one in slots if one.labels["kind"] == "total"] == list(range(NUM_ROWS))


async def test_many_monitors_cost_one_look(http: httpx.AsyncClient, asked: Counted) -> None:
    responses = await asyncio.gather(*(http.get(ROUTES[n % 3]) for n in range(30)))
    assert {response.status_code for response in responses} == {200}
    assert asked.num_calls == 1
    assert msgspec.json.decode((await http.get("/monitor/data")).content, type=MonitorData)


async def test_a_look_is_encoded_once_for_all_monitors(
    client: SchedulerClient, scheduler: ScriptedScheduler, asked: Counted
) -> None:
    watch = Watch(client, settings_for(scheduler, monitor_interval_s=0.001))
    first = await watch.json()
    while asked.num_calls == 1:
        assert (await watch.json() is first) == (asked.num_calls == 1)


async def test_without_a_scheduler_the_monitor_says_so(
    http: httpx.AsyncClient, asked: Counted
) -> None:
    asked.error = HeadwayError(Reason.NO_CAPACITY, "No scheduler can be reached.")
    response = await http.get("/monitor/data")
    assert (response.status_code, response.json()["code"]) == (503, "NO_CAPACITY")
    metrics = await http.get("/metrics")
    assert metrics.status_code == 200
    assert "headway_queue_depth" not in metrics.text


async def test_the_page_runs_its_own_script_only(http: httpx.AsyncClient) -> None:
    for path in ("/monitor", "/monitor/"):
        response = await http.get(path)
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        policy = response.headers["content-security-policy"]
        script = re.search(r"<script>(.*?)</script>", response.text, re.DOTALL)
        assert script
        hashed = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
        assert f"script-src 'sha256-{hashed}'" in policy
        assert "default-src 'none'" in policy
        assert "access-control-allow-origin" not in response.headers
        for foreign in ("http:", "https:", "innerHTML", "insertAdjacent", "document.write", "on="):
            assert foreign not in response.text


async def test_it_is_for_this_machine(http: httpx.AsyncClient) -> None:
    for path in ROUTES:
        for name in ("X-Forwarded-For", "Forwarded", "Via"):
            response = await http.get(path, headers={name: "1.2.3.4"})
            assert (response.status_code, response.json()["code"]) == (403, "PERMISSION_DENIED")


async def test_a_name_that_was_pointed_here_opens_nothing(
    client: SchedulerClient, scheduler: ScriptedScheduler, asked: Counted
) -> None:
    """DNS rebinding: with API keys other routes answer to any name, the monitor does not."""
    settings = settings_for(scheduler, api_keys="team=key", signing_key=SIGNING_KEY)
    rebound = {"Host": "rebound.example"}
    async with serving(client, settings) as url, httpx.AsyncClient(base_url=url) as http:
        for path in ROUTES:
            assert (await http.get(path)).status_code == 200
            assert (await http.get(path, headers=rebound)).status_code == 403
        assert (await http.get("/health", headers=rebound)).status_code == 200


async def test_elsewhere_it_needs_a_key_with_its_scope(
    client: SchedulerClient, scheduler: ScriptedScheduler, asked: Counted, tmp_path: Any
) -> None:
    operator, sampler = new_key("hw"), new_key("hw")
    file = tmp_path / "keys.toml"
    entries = [(operator, [Scope.MONITOR]), (sampler, [Scope.SAMPLE])]
    file.write_text(
        "\n".join(
            entry_text(key, PEPPER.encode(), {"tenant": "t", "scopes": scopes})
            for key, scopes in entries
        )
    )
    changes = {"api_keys_file": file, "key_pepper": PEPPER, "signing_key": SIGNING_KEY}
    settings = settings_for(scheduler, monitor="key", **changes)
    async with serving(client, settings) as url, httpx.AsyncClient(base_url=url) as http:
        for path in ROUTES:
            for key, status in ((operator, 200), (sampler, 403), ("", 401)):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                assert (await http.get(path, headers=headers)).status_code == status
        assert (await http.get("/monitor")).status_code == 200


async def test_it_can_be_turned_off(
    client: SchedulerClient, scheduler: ScriptedScheduler, asked: Counted
) -> None:
    settings = settings_for(scheduler, monitor="off")
    async with serving(client, settings) as url, httpx.AsyncClient(base_url=url) as http:
        for path in ("/monitor", "/monitor/", *ROUTES):
            assert (await http.get(path)).status_code == 404
    assert asked.num_calls == 0


def test_a_key_needs_keys() -> None:
    with pytest.raises(ValueError, match="monitor: key needs"):
        GatewaySettings(monitor="key")


async def test_metrics_count_answers_and_show_the_fleet(http: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/v1/models", "/v1/models/a/b", "/nowhere/secret", "/ready"):
        await http.get(path)
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for line in (
        'headway_http_answers_total{method="GET",route="/v1/models",status="200"} 2.0',
        'headway_http_answers_total{method="GET",route="/v1/models/{name:path}",status="404"} 1.0',
        'headway_http_answers_total{method="none",route="none",status="404"} 1.0',
        "headway_queue_depth 7.0",
        'headway_executor_slots{executor="executor-1",kind="acquired"} 3.0',
        'headway_executor_live{executor="<img src=x>"} 0.0',
        'headway_decisions_total{decision="admitted"} 12.0',
        'headway_queue_wait_seconds{of="p90"} 0.9',
        "headway_gateway_inflight 0.0",
    ):
        assert line in lines
    assert "secret" not in response.text
    assert "team" not in response.text, "no tenant is a label"


async def test_two_applications_keep_their_own_figures(
    client: SchedulerClient, settings: GatewaySettings
) -> None:
    build_app(client, settings)
    build_app(client, settings)  # one registry of all would refuse the second


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
async def test_a_browser_shows_names_as_text(http: httpx.AsyncClient, tmp_path: Any) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=4000", f"--user-data-dir={tmp_path}"]
    url = str(http.base_url.join("/monitor"))
    done = await asyncio.to_thread(
        subprocess.run, [*command, url], capture_output=True, timeout=60, check=True
    )
    page = done.stdout.decode()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;img src=x&gt;" in page
    assert "<img" not in page
    assert ">live<" in page
    assert ">cold (time slice) for 1.5s of at most 1m 01s<" in page
    assert "<td>session-</td><td>1</td><td>2.5s</td>" in page, "the band beside the age"
    assert '<td class="bad">lost</td>' in page
    assert '<span>6 more</span> <button hidden="">' in page, "they wait, and are not in the data"
    assert re.search(r'id="backends-more" hidden=""', page)
