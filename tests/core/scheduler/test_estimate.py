"""Position, depth, ETA and Retry-After: one estimator, honest numbers."""

from typing import Any

import pytest

from scheduler_svc.core.estimate import Ahead, Estimator
from tests.core.scheduler.helpers import Driver, interpreted_only, rejection
from tests.core.scheduler.test_scenarios import World


def test_position_counts_what_will_be_granted_earlier_in_the_pool() -> None:
    driver = Driver()
    driver.attach("e1", models="AB")
    driver.attach("e2", models="C")
    driver.submit("running", "A")
    driver.submit("c0", "C")
    for name, model, band in (("a1", "A", 1), ("b1", "B", 1), ("c1", "C", 1), ("a0", "A", 0)):
        driver.submit(name, model, band=band)
    positions = {name: driver.status(name).position for name in ("a0", "a1", "b1", "c1")}
    assert positions == {"a0": 0, "a1": 1, "b1": 2, "c1": 0}
    assert driver.status("b1").depth == 3
    assert driver.status("c1").depth == 1
    running = driver.status("running")
    assert (running.is_running, running.position) == (True, 0)


def test_position_counts_down() -> None:
    driver = Driver()
    driver.attach()
    for name in "abcd":
        driver.submit(name)
    seen = [driver.status("d").position]
    for name in "abc":
        driver.end(name)
        seen.append(driver.status("d").position)
    assert seen == [2, 1, 0, 0]
    assert driver.core.status("unknown", driver.now_ms) is None


def test_nothing_measured_means_no_estimate() -> None:
    driver = Driver(retry_after_min_ms=700)
    driver.attach()
    driver.submit("a")
    driver.submit("b")
    assert driver.status("b").estimated_wait_ms is None
    assert driver.status("b").retry_after_ms == 700
    assert driver.status("a").estimated_wait_ms is None


@interpreted_only
def test_no_place_is_computed_while_nothing_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place costs more than all the rest of a submit, and a burst may come before any lease
    ended."""
    asked: list[Any] = []
    before = Estimator.ahead

    def watched(*given: Any) -> Ahead:
        asked.append(given)
        return before(*given)

    monkeypatch.setattr(Estimator, "ahead", watched)
    driver = Driver()
    driver.attach()
    for name in "abc":
        driver.submit(name)
    assert not asked
    driver.advance(100)
    driver.end("a")
    driver.submit("d")
    assert len(asked) == 1
    driver.submit("e")
    assert len(asked) == 1  # the next one after a while


def test_one_lease_is_enough_for_a_first_estimate() -> None:
    driver = Driver()
    driver.attach(num_slots=2)
    driver.submit("a")
    driver.advance(4_000)
    driver.end("a")
    for name in "bcdef":
        driver.submit(name)
    # 4 slot-seconds each, two slots: one grant every 2 s
    assert [driver.status(name).estimated_wait_ms for name in "def"] == [2_000, 4_000, 6_000]
    assert driver.status("b").estimated_wait_ms == 4_000
    driver.advance(1_500)
    assert driver.status("b").estimated_wait_ms == 2_500


def test_leases_that_last_longer_than_all_before_make_waits_longer() -> None:
    """The mean is that of the leases that ended. After 12 s without an end it is 12 s at least."""
    driver = Driver()
    driver.attach(num_slots=2)
    driver.submit("a")
    driver.advance(5)
    driver.end("a")
    for name in "bcdef":
        driver.submit(name)
    assert driver.status("d").estimated_wait_ms == 2
    driver.advance(12_000)
    assert [driver.status(name).estimated_wait_ms for name in "def"] == [6_000, 12_000, 18_000]
    driver.end("b")
    assert driver.status("e").estimated_wait_ms == 3_078


def test_a_model_at_its_limit_waits_for_its_own_leases() -> None:
    """Four slots, but one lease of A at a time; those of B go on beside it."""
    driver = Driver(model_limits={"A": 1})
    driver.attach(num_slots=4, models="AB")
    driver.submit("a0")
    driver.advance(4_000)
    driver.end("a0")
    for name in ("a1", "a2", "b1", "a3"):
        driver.submit(name, name[0].upper())
    driver.submit("a4", band=1)
    waits_ms = [driver.status(name).estimated_wait_ms for name in ("a2", "a3", "a4")]
    assert waits_ms == [4_000, 8_000, 12_000]
    rows = {row.request_id: row for row in driver.core.snapshot(driver.now_ms, 10).queue}
    assert [rows[name].status.estimated_wait_ms for name in ("a2", "a3", "a4")] == waits_ms
    assert driver.status("a2").retry_after_ms == 4_000


def test_an_idle_fleet_is_no_slow_one() -> None:
    driver = Driver(max_inflight_per_tenant=1)
    driver.attach()
    driver.submit("a")
    driver.advance(5)
    driver.end("a")
    driver.advance(30_000)
    driver.submit("b")
    assert rejection(driver.submit("c")).retry_after_ms == 1_000


def test_the_measured_rate_takes_over() -> None:
    driver = Driver()
    driver.attach(num_slots=1)
    driver.submit("r0", queue_timeout_ms=10**9, execution_timeout_ms=10**9)
    for number in range(1, 40):
        driver.submit(f"r{number}", queue_timeout_ms=10**9, execution_timeout_ms=10**9)
    for number in range(20):
        driver.advance(3_000)
        driver.end(f"r{number}")
    wait_ms = driver.status("r39").estimated_wait_ms
    assert wait_ms is not None
    # 18 before it, then itself: 19 grants at 3 s
    assert abs(wait_ms - 57_000) < 3_000


def test_an_idle_stretch_does_not_look_like_a_slow_rate() -> None:
    driver = Driver()
    driver.attach(num_slots=1)
    for number in range(10):
        driver.submit(f"idle{number}")
        driver.advance(100)
        driver.end(f"idle{number}")
        driver.advance(60_000)
    driver.submit("a")
    driver.submit("b")
    assert driver.status("b").estimated_wait_ms == 100


def test_without_a_serving_executor_nothing_is_promised() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.advance(100)
    driver.end("a")
    driver.submit("b")
    driver.submit("c")
    assert driver.status("c").estimated_wait_ms == 100
    driver.disconnect()
    assert driver.status("c").estimated_wait_ms is None


def test_retry_after_is_the_backlog_within_its_limits() -> None:
    driver = Driver(max_queued_requests=3, retry_after_min_ms=500, retry_after_max_ms=9_000)
    driver.attach()
    driver.submit("a")
    driver.advance(2_000)
    driver.end("a")
    for name in "bcde":
        driver.submit(name)
    assert rejection(driver.submit("f")).retry_after_ms == 8_000
    driver.end("b")
    driver.submit("slow")
    driver.advance(50_000)
    driver.end("c")
    driver.submit("g")
    assert rejection(driver.submit("h")).retry_after_ms == 9_000


def test_snapshot_shows_the_first_rows_in_grant_order() -> None:
    driver = Driver()
    driver.attach(num_slots=1, models="AB")
    driver.submit("running")
    driver.submit("low", "B", band=2)
    driver.submit("high", "A", band=0, tenant="other")
    driver.advance(250)
    snapshot = driver.core.snapshot(driver.now_ms, 1)
    assert (snapshot.num_waiting, snapshot.num_running) == (2, 1)
    [row] = snapshot.queue
    assert (row.request_id, row.tenant, row.band, row.waited_ms) == ("high", "other", 0, 250)
    assert row.status == driver.status("high")
    [executor] = snapshot.executors
    assert executor.resident_models == ("A", "B")
    assert snapshot.decisions["granted"] == 1
    rows = driver.core.snapshot(driver.now_ms, 10).queue
    assert [row.request_id for row in rows] == ["high", "low"]


def test_a_model_that_waits_for_a_place_keeps_its_turn_whatever_else_is_measured() -> None:
    """The time since when it is nowhere decides when it may drain a home: it must not be lost."""
    driver = Driver(max_known_models=1, aging_equalization_ms=5_000)
    driver.attach(models="ABCD")
    state = driver.core._state
    state.estimator.backlog_began("X", driver.now_ms)
    driver.advance(3_000)
    for model in "ABCD":
        driver.submit(model, model)
        driver.end(model)
    assert state.estimator.placeless_ms("X", driver.now_ms) == 3_000


def test_a_place_that_is_coming_is_nearer_with_every_millisecond() -> None:
    """Before anything was learned an estimate for a model without a home is a quarter longer."""
    world = World(load_ms=4_000)
    world.run_ms = {"A": 10_000}
    for name in ("b1", "b2"):
        world.backend(name, 1, "AB", max_models=1, resident="A")
    world.ask("AA")
    world.advance(10_000)
    world.ask("AA")
    world.advance(2_000)
    [b] = world.ask("B")
    assert world.reservation("b1") == "B"
    assert world.status(b).estimated_wait_ms == (8_000 + 4_000) * 1.25
    world.advance(5_000)
    assert world.status(b).estimated_wait_ms == (3_000 + 4_000) * 1.25
    world.advance(3_000)
    assert world.row("b1").loading_model == "B"
    assert world.status(b).estimated_wait_ms == 4_000 * 1.25
    world.advance(3_000)
    assert world.status(b).estimated_wait_ms == 1_000 * 1.25


def test_a_row_of_the_snapshot_says_what_its_client_is_told() -> None:
    """Also where it matters whose backlog stands before it (calibration.py)."""
    driver = Driver()
    driver.attach()
    driver.submit("running", tenant="a")
    driver.advance(1_000)
    driver.end("running")
    for number in range(12):
        driver.submit(f"a{number}", tenant="a")
        driver.submit(f"b{number}", tenant="b", max_tokens=1)
    calibration = driver.core._state.estimator._calibration
    for part in range(4):
        for distance in (2, 3):
            calibration._factors["home", distance, part] = 1.0 + part, 9
    rows = driver.core.snapshot(driver.now_ms, 100).queue
    assert len(rows) == 23
    assert {row.request_id: row.status for row in rows} == {
        row.request_id: driver.status(row.request_id) for row in rows
    }
