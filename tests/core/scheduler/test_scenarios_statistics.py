"""Scenarios 65-67, 69: waits, shares, utilisation, the order of the queue's rows."""

from scheduler_svc.core.answers import ExecutorStats
from tests.core.scheduler.test_scenarios import World

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


def waits(world: World) -> tuple[float, float, float, int] | None:
    return world.core.snapshot(world.now_ms, 0).queue_wait_ms


def stats(world: World, name: str) -> ExecutorStats:
    found = world.row(name).stats
    assert found is not None
    return found


def wait_for(world: World, *waits_ms: int) -> None:
    """Requests that waited so long until their grant, longest first."""
    with world.closed():
        world.advance(0)
        for wait_ms, next_ms in zip(waits_ms, [*waits_ms[1:], 0], strict=True):
            world.ask("A")
            world.advance(wait_ms - next_ms)


def test_scenario_65_percentiles_of_the_queue_wait() -> None:
    world = World()
    world.backend("b1", 16, "A", resident="A")
    assert waits(world) is None
    wait_for(world, *range(10, 0, -1))
    assert waits(world) == (1, 5.5, 9, 10)
    world = World()
    world.backend("b1", 16, "A", resident="A")
    wait_for(world, 7)
    assert waits(world) == (7, 7, 7, 1)


def test_scenario_66_a_sample_older_than_an_hour_does_not_count() -> None:
    world = World()
    world.backend("b1", 2, "A", resident="A")
    wait_for(world, 5)
    world.advance(HOUR_MS - 1)
    assert waits(world) == (5, 5, 5, 1)
    world.advance(2)
    assert waits(world) is None


def test_scenario_67_shares_and_utilisation() -> None:
    world = World()
    world.backend("b1", 2, "A", resident="A")
    world.backend("b2", 2, "B", resident="B")
    world.done(*world.run("AA", "b1"), *world.run("B", "b2"))
    world.done(*world.run("A", "b1"))
    assert (stats(world, "b1").share, stats(world, "b2").share) == (0.75, 0.25)

    world = World()
    world.backend("b1", 2, "A", resident="A")
    [name] = world.ask("A", execution_timeout_ms=DAY_MS)
    world.advance(HOUR_MS)
    world.done(name)
    assert stats(world, "b1").utilisation == 0.5

    world = World()
    world.backend("b1", 2, "A", resident="A")
    names = world.ask("AA", execution_timeout_ms=DAY_MS)
    world.change("b1", 1)
    world.advance(HOUR_MS)
    world.done(*names)
    assert stats(world, "b1").utilisation == 1


def test_scenario_69_rows_by_priority_and_none_without_a_bonus() -> None:
    """The session id is whole here; whoever shows it cuts it to 8 characters."""
    for bonus in (0, 10):
        world = World(bonus=bonus)
        world.backend("b1", 1, "A", resident="A")
        world.backend("b2", 0, "B", max_models=1)
        world.run("A", "b1")
        [cold] = world.ask("B")
        world.advance(10)
        [warm] = world.ask("A", session_id="0123456789")
        rows = world.core.snapshot(world.now_ms, 10).queue
        if bonus:
            assert [row.request_id for row in rows] == [warm, cold]
            priorities = [row.priority for row in rows if row.priority is not None]
            assert len(priorities) == len(rows)
            assert priorities == sorted(priorities, reverse=True)
        else:
            assert [row.request_id for row in rows] == [cold, warm]
            assert [row.priority for row in rows] == [None, None]
        assert {row.session_id for row in rows} == {"", "0123456789"}
