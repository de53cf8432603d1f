"""The rolling hour of an executor, and the waits of requests."""

from scheduler_svc.core.stats import HOUR_MS, Activity, Waits, nearest_rank
from tests.core.scheduler.helpers import Driver

MINUTE_MS = 60_000


def test_utilisation_is_over_the_time_that_is_known() -> None:
    """W13: a minute after its start it says what that minute was."""
    activity = Activity()
    activity.note(0, 2, 1_000)
    activity.note(1, 2, 31_000)
    summary = activity.summary(0, None, 61_000)
    assert summary.utilisation == 0.25
    assert (summary.share, summary.mean_duration_ms, summary.affinity) == (None, None, None)
    assert Activity().summary(0, None, 5).utilisation is None


def test_a_long_lease_is_booked_as_it_runs_and_falls_out_minute_by_minute() -> None:
    activity = Activity()
    activity.note(1, 1, 0)
    activity.note(0, 1, 30 * MINUTE_MS)
    assert activity.summary(0, None, HOUR_MS - 1).utilisation == 1_800_000 / 3_599_999
    activity.note(0, 1, HOUR_MS)
    later = activity.summary(0, None, HOUR_MS + 15 * MINUTE_MS)
    assert later.utilisation is not None
    assert abs(later.utilisation - 0.25) < 0.02
    activity.note(0, 1, 2 * HOUR_MS)
    assert activity.summary(0, None, 2 * HOUR_MS).utilisation == 0.0


def test_an_executor_away_for_days_costs_no_more_than_an_hour() -> None:
    activity = Activity()
    activity.note(1, 1, 0)
    activity.note(0, 1, 100 * 24 * HOUR_MS)
    assert len(activity._buckets) <= 60


def test_failures_lower_no_mean_but_count_as_leases() -> None:
    activity = Activity()
    activity.ended(1_000, True, 5)
    activity.ended(3_000, True, 6)
    activity.ended(1, False, 7)
    summary = activity.summary(6, 0.5, 10)
    assert (summary.num_leases, summary.share) == (3, 0.5)
    assert (summary.mean_duration_ms, summary.affinity) == (2_000, 0.5)


def test_waits_are_the_last_hour_by_nearest_rank() -> None:
    waits = Waits(100)
    assert waits.summary(0) is None
    waits.add(999, 0)
    for wait in range(1, 11):
        waits.add(wait, 1_000)
    assert waits.summary(HOUR_MS) == (1, 5.5, 9, 10)
    assert nearest_rank([7], 0.1) == nearest_rank([7], 0.9) == 7


def test_waits_are_bounded() -> None:
    waits = Waits(3)
    for wait in range(10):
        waits.add(wait, 0)
    assert waits.summary(0) == (7, 8, 9, 3)


def test_the_snapshot_carries_them() -> None:
    driver = Driver()
    driver.attach(num_slots=1)
    driver.submit("a")
    driver.submit("b")
    driver.advance(1_000)
    driver.end("a")
    driver.advance(1_000)
    stats = driver.row().stats
    assert stats is not None
    assert (stats.num_leases, stats.share, stats.utilisation) == (1, 1.0, 1.0)
    assert stats.mean_duration_ms == 1_000
    assert driver.core.snapshot(driver.now_ms, 0).queue_wait_ms == (0, 500, 1_000, 2)


def test_a_row_tells_what_works_from_what_is_only_there() -> None:
    """A model whose hold is over is on the device, but neither held nor at work."""
    driver = Driver(model_hold_ms=1_000)
    driver.attach(num_slots=4, models="AB")
    driver.submit("a", "A")
    driver.submit("b", "B")
    assert set(driver.row().active_models) == {"A", "B"}
    driver.end("b")
    assert (driver.row().active_models, driver.row().held_models) == (("A",), ("B",))
    driver.advance(1_001)
    assert (driver.row().active_models, driver.row().held_models) == (("A",), ())
    assert driver.row().resident_models == ("A", "B")
