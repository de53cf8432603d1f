"""The queue as operators see it: numbered as it will be granted."""

from typing import Any

from tests.core.scheduler.helpers import Driver, granted


def rows(driver: Driver) -> list[tuple[str, int]]:
    found = driver.core.snapshot(driver.now_ms, 100).queue
    return [(row.request_id, row.status.position) for row in found]


def served(driver: Driver, num: int) -> list[str]:
    """Who is granted next, one after another."""
    names: list[str] = []
    running = "running"
    while len(names) < num:
        [(running, _)] = granted(driver.end(running))
        names.append(running)
    return names


def test_who_waited_longer_than_its_band_may_keep_it_is_shown_where_it_goes() -> None:
    driver = Driver(band_max_wait_ms=(500, 1_000), band_min_shares=())
    driver.attach()
    driver.submit("running")
    driver.submit("late", band=2)
    driver.submit("later", band=1)
    driver.advance(600)
    driver.submit("first")
    assert rows(driver) == [("first", 0), ("later", 1), ("late", 2)]
    driver.advance(400)
    expected = ["late", "later", "first"]
    assert rows(driver) == [(name, place) for place, name in enumerate(expected)]
    assert served(driver, 3) == expected


def test_a_young_head_is_shown_as_old_as_the_oldest_of_its_flow_makes_it() -> None:
    """Of model A somebody waits for long behind the newcomer of a tenant that had less service."""
    driver = Driver(aging_equalization_ms=1_000)
    driver.attach(models="AB")
    driver.submit("running", tenant="served")
    driver.submit("a old", tenant="served")
    driver.advance(1_500)
    driver.submit("b", "B", tenant="served")
    driver.advance(1_500)
    driver.submit("a new", tenant="new")
    expected = [name for name, _ in rows(driver)]
    assert expected == ["a new", "a old", "b"]
    assert served(driver, 3) == expected


def test_a_large_fleet_is_looked_at_bit_by_bit_while_it_changes() -> None:
    driver = Driver(executor_grace_ms=0)
    for number in range(600):
        driver.core.handle(driver.attachment(f"e{number}"), driver.now_ms)
    driver.submit("r")
    made = driver.core.snapshot_in_parts(driver.now_ms, 10)
    next(made)
    num_parts = 0
    found: Any = None
    while found is None:
        num_parts += 1
        driver.disconnect(f"e{600 - num_parts}")
        driver.advance(1)
        try:
            made.send(driver.now_ms)
        except StopIteration as end:
            found = end.value
    assert num_parts > 3
    assert [row.executor_id for row in found.executors] == [f"e{number}" for number in range(599)]
    assert found.num_running == 1
    whole = driver.core.snapshot(driver.now_ms, 10)
    assert whole.executors == found.executors[: len(whole.executors)]
    assert whole.models == found.models


def test_one_executor_is_found_by_its_name() -> None:
    driver = Driver()
    driver.attach("e1", 3)
    row = driver.core.executor("e1", driver.now_ms)
    assert row == driver.row("e1")
    assert driver.core.executor("e2", driver.now_ms) is None
