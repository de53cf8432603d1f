"""Scenarios 42-53: reservations, last homes, and that a cold model starts within a bound."""

from tests.core.scheduler.helpers import finished
from tests.core.scheduler.test_scenarios import World


def two_homes(**settings: int) -> World:
    """b1(2,1) runs one A and could run B; b2(2) serves A only."""
    world = World(**settings)
    world.backend("b1", 2, max_models=1)
    world.run("A", "b1")
    world.backend("b2", 2, "A", max_models=1)
    return world


def test_scenario_42_a_sole_home_is_not_reserved() -> None:
    world = World()
    world.backend("b1", 2, max_models=1)
    world.run("A", "b1")
    b, a = world.ask("BA")
    assert world.places(b, a) == [None, "b1"]
    assert world.reservation("b1") is None


def test_scenario_43_the_hold_is_waived_when_the_last_one_ends() -> None:
    world = World(hold_ms=60_000)
    world.backend("b1", 2, max_models=1)
    [a] = world.run("A", "b1")
    [b] = world.ask("B")
    assert world.place(b) is None
    world.done(a)
    assert world.place(b) == "b1"


def test_scenario_44_a_reservation_sends_the_warm_model_to_its_other_home() -> None:
    world = two_homes()
    b, a = world.ask("BA")
    assert world.reservation("b1") == "B"
    assert world.places(b, a) == [None, "b2"]


def test_scenario_45_a_reservation_waits_for_the_last_one() -> None:
    world = World()
    world.backend("b1", 2, max_models=1)
    a1, a2 = world.run("AA", "b1")
    world.backend("b2", 2, max_models=1)
    a3, _ = world.run("AA", "b2")
    [b] = world.ask("B")
    assert world.place(b) is None
    world.done(a1)
    assert world.place(b) is None
    world.done(a3)
    [a] = world.ask("A")
    assert world.places(a, b) == ["b2", None]
    world.done(a2)
    assert world.place(b) == "b1"


def test_scenario_46_one_executor_is_reserved_the_one_with_most_free_slots() -> None:
    world = World()
    world.backend("b1", 3, max_models=1)
    world.run("A", "b1")
    world.backend("b2", 2, max_models=1)
    with_b1_full = world.change("b1", 1)
    assert with_b1_full == []
    world.run("A", "b2")
    world.change("b1", 3)
    b, a = world.ask("BA")
    assert (world.reservation("b1"), world.reservation("b2")) == ("B", None)
    assert world.places(b, a) == [None, "b2"]


def test_scenario_47_of_equals_the_first_is_reserved() -> None:
    """B and the end on b1 are decided together, as in the reference's one cycle: the end first."""
    world = World()
    world.backend("b1", 2, max_models=1)
    ending, _ = world.run("AA", "b1")
    for name in ("b2", "b3"):
        world.backend(name, 2, max_models=1)
        world.run("A", name)
        world.change(name, 1)
    for name in ("b2", "b3"):
        world.change(name, 2)
    world.done(ending)
    b, a = world.ask("BA")
    assert world.reservation("b1") == "B"
    assert world.place(b) is None
    assert world.place(a) in ("b2", "b3")


def test_scenario_48_without_max_models_nothing_is_reserved() -> None:
    world = World()
    world.backend("b1", 2)
    world.run("A", "b1")
    world.backend("b2", 2, "A")
    b, a = world.ask("BA")
    assert world.places(b, a) == ["b1", "b2"]
    assert (world.reservation("b1"), world.reservation("b2")) == (None, None)


def test_scenario_49_sustained_load_does_not_keep_the_cold_model_out() -> None:
    world = World()
    world.backend("b1", 2, max_models=1)
    a1, a2 = world.run("AA", "b1")
    world.backend("b2", 2, max_models=1)
    a3, _ = world.run("AA", "b2")
    bs = world.ask("BBB")
    world.done(a1, a3)
    [a] = world.ask("A")
    assert world.places(a, *bs) == ["b2", None, None, None]
    world.done(a2)
    assert "b1" in world.places(*bs)


def test_scenario_50_a_home_that_is_down_is_no_alternative() -> None:
    world = two_homes()
    world.disconnect("b2")
    b, a = world.ask("BA")
    assert world.reservation("b1") is None
    assert world.places(b, a) == [None, "b1"]


def test_scenario_51_a_reservation_ends_with_its_owner() -> None:
    world = two_homes()
    [b] = world.ask("B")
    world.run("AA", "b2")
    [a] = world.ask("A")
    assert (world.reservation("b1"), world.place(a)) == ("B", None)
    world.cancel(b)
    assert (world.reservation("b1"), world.place(a)) == (None, "b1")


def test_scenario_52_two_cold_models_leave_a_home_to_the_third() -> None:
    world = World()
    world.backend("b1", 2, "ABC", max_models=1)
    world.run("A", "b1")
    world.change("b1", 1)
    world.backend("b2", 2, "ABC", max_models=1)
    world.run("A", "b2")
    world.change("b1", 2)
    b, c, *a = world.ask("BCA")
    reserved = [world.reservation("b1"), world.reservation("b2")]
    assert reserved.count(None) == 1
    free = ("b1", "b2")[reserved.index(None)]
    assert world.places(b, c, *a) == [None, None, free]


def test_scenario_53_one_executor_and_an_endless_stream_of_another_model() -> None:
    """start <= arrival + E + residual execution + load + dwell of the switch budget (+ one step).

    The load of 2 s may take a tenth of the time, so a forced switch dwells up to 2 s / 0.1. Twice:
    the second time B comes while the executor dwells after the switch back to A.
    """
    equalization_ms, run_ms, load_ms, step_ms, share = 5_000, 1_000, 2_000, 500, 0.1
    bound_ms, dwell_ms = equalization_ms + run_ms + load_ms + step_ms, round(load_ms / share)
    world = World(
        equalization_ms=equalization_ms, load_ms=load_ms, hold_ms=3_000, switch_time_share=share
    )
    world.run_ms = {"A": run_ms}
    world.backend("b1", 2, max_models=1, resident="A")
    for _ in range(40):
        world.advance(step_ms)
        world.ask("A" * max(0, 4 - world.core.num_waiting))
    waits_ms = []
    for _ in range(2):
        [b] = world.ask("B")
        asked_ms = world.now_ms
        while world.place(b) is None:
            world.advance(step_ms)
            world.ask("A" * max(0, 5 - world.core.num_waiting))
            assert world.now_ms - asked_ms <= bound_ms + dwell_ms
        waits_ms.append(world.now_ms - asked_ms)
        assert b not in finished(world.sent)
        world.done(b)
        num_done = len(finished(world.sent))
        world.advance(load_ms + 2 * run_ms + step_ms)
        assert len(finished(world.sent)) > num_done, "A is back at once: nobody waits for B"
        world.ask("A" * max(0, 5 - world.core.num_waiting))
    assert waits_ms[0] <= bound_ms < waits_ms[1]
