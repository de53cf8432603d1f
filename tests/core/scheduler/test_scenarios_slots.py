"""Scenarios 11-24: slots, holds, max_models, model limits, capacity, executors that vanish."""

from scheduler_svc.core.messages import LeaseStarted
from tests.core.scheduler.helpers import EPOCH, finished, granted, held
from tests.core.scheduler.test_scenarios import World

MINUTE_MS = 60_000


def world_with_hold(**settings: int) -> World:
    """b1(2, 1) with A held for a minute and nothing running."""
    world = World(hold_ms=MINUTE_MS, **settings)
    world.backend("b1", 2, max_models=1)
    world.done(*world.run("A", "b1"))
    assert world.row("b1").held_models == ("A",)
    return world


def test_scenario_11_a_hold_keeps_others_out_until_it_is_waived() -> None:
    fifo = world_with_hold(bonus=0)  # where nothing waives
    [b] = fifo.ask("B")
    assert fifo.place(b) is None
    hybrid = world_with_hold()
    [b] = hybrid.ask("B")
    assert hybrid.place(b) == "b1"
    assert hybrid.row("b1").held_models == ()


def test_scenario_12_without_a_free_slot_nothing_is_waived() -> None:
    world = World(hold_ms=MINUTE_MS)
    world.backend("b1", 1, "ABC", max_models=2)
    world.done(*world.run("A", "b1"))
    world.run("C", "b1")
    [b] = world.ask("B")
    assert world.place(b) is None
    assert world.row("b1").held_models == ("A",)


def test_scenario_13_the_held_model_itself_waives_nothing() -> None:
    world = world_with_hold()
    [a] = world.ask("A")
    assert world.place(a) == "b1"
    assert world.row("b1").resident_models == ("A",)


def test_scenario_14_no_waiver_where_max_models_blocks_all_the_same() -> None:
    world = World(hold_ms=MINUTE_MS)
    world.backend("b1", 2, "ABC", max_models=2)
    world.run("C", "b1")
    world.done(*world.run("A", "b1"))
    world.change("b1", 2, max_models=1)
    [b] = world.ask("B")
    assert world.place(b) is None
    assert world.row("b1").held_models == ("A",)


def test_scenario_15_without_a_hold_there_is_nothing_to_waive() -> None:
    world = World()
    world.backend("b1", 2, max_models=1)
    world.done(*world.run("A", "b1"))
    assert world.row("b1").held_models == ()
    world.run("B", "b1")
    assert world.row("b1").resident_models == ("B",)


def test_scenario_16_during_a_hold_its_model_is_accepted() -> None:
    for bonus in (0, 10):
        world = world_with_hold(bonus=bonus)
        world.run("AA", "b1")


def test_scenario_17_a_model_limit_holds_for_the_whole_fleet() -> None:
    world = World(model_limits={"A": 1})
    world.backend("b1", 2)
    world.backend("b2", 2)
    first, second = world.ask("AA")
    assert world.places(first, second) == ["b1", None]
    world.run("B", "b2")
    world.done(first)
    assert world.place(second) is not None


def test_scenario_18_max_models_of_one() -> None:
    world = World(bonus=0)
    world.backend("b1", 3, max_models=1)
    [a] = world.run("A", "b1")
    [b] = world.ask("B")
    assert world.place(b) is None
    world.done(*world.run("A", "b1"))
    assert world.place(b) is None
    world.done(a)
    assert world.place(b) == "b1"


def test_scenario_19_without_max_models_they_share_up_to_capacity() -> None:
    world = World(bonus=0)
    world.backend("b1", 3)
    world.run("ABA", "b1")
    assert world.places(*world.ask("AB")) == [None, None]


def test_scenario_20_a_hold_opens_with_the_last_end_of_a_model_only() -> None:
    """Settled otherwise: a hold is a model's and not an executor's, since several may be there.

    The reference opens one for the last model to leave; ours protects A's place while C runs.
    """
    world = World(hold_ms=MINUTE_MS)
    world.backend("b1", 4, "AC", max_models=2)
    first, second, c = world.run("AAC", "b1")
    world.done(first)
    assert world.row("b1").held_models == ()
    world.done(second)
    assert world.row("b1").held_models == ("A",)
    world.done(c)
    assert set(world.row("b1").held_models) == {"A", "C"}


def test_scenario_21_ending_more_often_than_granted_frees_nothing() -> None:
    world = World()
    world.backend("b1", 2)
    first, second = world.run("AA", "b1")
    world.done(first)
    for _ in range(3):
        world.end(first, "b1")
    assert (world.row("b1").num_free, world.row("b1").num_leased) == (1, 1)
    assert world.place(second) == "b1"
    world.done(second)
    assert (world.row("b1").num_free, world.row("b1").num_leased) == (2, 0)


def test_scenario_22_capacity_below_use_kills_nothing_and_takes_nothing() -> None:
    world = World()
    world.backend("b1", 3)
    running = world.run("AAA", "b1")
    [waiting] = world.ask("A")
    world.change("b1", 1)
    assert world.places(*running) == ["b1"] * 3
    world.done(*running[:2])
    assert world.place(waiting) is None
    world.done(running[2])
    assert world.place(waiting) == "b1"


def test_scenario_23_a_lost_executor_comes_back_with_what_it_still_holds() -> None:
    world = World(executor_grace_ms=1_000)
    world.backend("b1", 2)
    kept, lost = world.run("AA", "b1")
    world.disconnect("b1")
    row = world.row("b1")
    assert (row.num_free, row.num_leased, row.num_in_doubt) == (0, 0, 2)
    sent = world.attach("b1", 2, "AB", holds=(held(kept),))
    assert granted(sent) == [(lost, "b1")]
    assert (world.row("b1").num_leased, world.row("b1").num_in_doubt) == (2, 0)
    assert finished(world.sent) == {}


def test_scenario_24_an_unknown_executor_is_nobody() -> None:
    world = World(hold_ms=MINUTE_MS)
    world.backend("b1", 1)
    world.run("A", "b1")
    assert world.handle(LeaseStarted("nobody", 1, "A1", 1)) == []
    world.sessions["nobody"] = 1
    assert world.end("A1", "nobody", attempt=1, epoch=EPOCH) == []
    assert world.drain("nobody") == []
    assert [row.executor_id for row in world.core.snapshot(world.now_ms, 0).executors] == ["b1"]
    assert world.place("A1") == "b1"
