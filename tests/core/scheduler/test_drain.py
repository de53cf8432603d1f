"""Reservations: for whom, where, what may still start there, and when they end."""

from typing import Any

from scheduler_svc.core.messages import LeaseEnded, LeaseOutcome
from tests.core.scheduler.helpers import EPOCH, granted, held, interpreted_only
from tests.core.scheduler.test_scenarios import World


def two_homes(**settings: Any) -> World:
    """b1 and b2 with two slots and one model each, A running on both."""
    world = World(load_ms=1_000, **settings)
    for name in ("b1", "b2"):
        world.backend(name, 2, "ABC", max_models=1, resident="A")
    world.run("A", "b1")
    world.run("A", "b2")
    return world


def measured_drain(**settings: Any) -> World:
    """b1, where a token of A takes 100 ms, drains for B; A runs there and fills b2."""
    world = World(**settings)
    world.backend("b1", 2, "AB", max_models=1, resident="A")
    world.backend("b2", 1, "A", resident="A")
    [measured] = world.run("A", "b1")
    world.advance(4_000)
    ref = ("b1", world.sessions["b1"], measured, EPOCH, 1)
    world.handle(LeaseEnded(*ref, LeaseOutcome.COMPLETED, num_generated_tokens=40))
    world.change("b2", 0)
    world.run("A", "b1")
    world.change("b2", 1)
    world.run("A", "b2")
    world.ask("B")
    assert world.reservation("b1") == "B"
    return world


def test_a_cold_model_reserves_one_executor_and_it_takes_nothing_new() -> None:
    world = two_homes()
    [b] = world.ask("B")
    assert [world.reservation(name) for name in ("b1", "b2")] == ["B", None]
    assert world.places(*world.ask("AA")) == ["b2", None]
    world.done("A1")
    world.advance(1_001)
    assert world.place(b) == "b1"
    assert world.reservation("b1") is None


def test_a_reservation_ends_with_its_last_request() -> None:
    world = two_homes()
    first, second = world.ask("BB")
    world.cancel(first)
    assert world.reservation("b1") == "B"
    waiting = world.ask("AA")
    world.cancel(second)
    assert world.reservation("b1") is None
    assert world.places(*waiting) == ["b2", "b1"]


def test_a_reservation_moves_when_its_executor_goes_away() -> None:
    world = two_homes()
    world.backend("b3", 2, "A", max_models=1, resident="A")
    world.ask("B")
    assert world.reservation("b1") == "B"
    world.disconnect("b1")
    assert world.reservation("b2") == "B"


def test_the_soonest_empty_goes_first_not_the_one_with_most_free_slots() -> None:
    """W8: one lease that just began against three that are nearly over."""
    world = World()
    world.backend("b1", 8, "AB", max_models=1, resident="A")
    world.backend("b2", 4, "AB", max_models=1, resident="A")
    [measured] = world.run("A", "b1")
    world.advance(10_000)
    world.done(measured)
    world.change("b1", 0)
    world.run("AAA", "b2")
    world.change("b1", 8)
    world.advance(9_000)
    world.run("A", "b1")
    world.ask("B")
    assert [world.reservation(name) for name in ("b1", "b2")] == [None, "B"]


def test_what_surely_ends_before_the_drain_may_still_start() -> None:
    """W15: 2 x 5 tokens fit into the drain, 2 x 50 do not."""
    world = measured_drain()
    [long] = world.ask("A", max_tokens=50)
    [behind] = world.ask("A", max_tokens=5)
    assert world.places(long, behind) == [None, None]
    world.cancel(long)
    assert world.place(behind) == "b1"
    world.advance(3_500)
    world.done(behind)
    [late] = world.ask("A", max_tokens=5)
    assert world.place(late) is None


def test_a_model_at_its_limit_reserves_nothing() -> None:
    """A8."""
    world = two_homes(model_limits={"B": 1})
    world.backend("b3", 1, "B", resident="B")
    world.run("B", "b3")
    world.disconnect("b3")
    world.ask("B")
    assert [world.reservation(name) for name in ("b1", "b2")] == [None, None]


def test_in_fifo_order_nothing_is_reserved() -> None:
    world = two_homes(bonus=0)
    world.ask("B")
    world.advance(50_000)
    assert [world.reservation(name) for name in ("b1", "b2")] == [None, None]


def test_the_row_says_for_whom_why_and_how_long() -> None:
    world = two_homes()
    world.ask("B", execution_timeout_ms=30_000)
    world.advance(400)
    row = world.row("b1").reservation
    assert row is not None
    assert (row.model, row.reason, row.age_ms) == ("B", "drain", 400)
    # when the last lease there is over at the latest, and its revoke confirmed
    assert row.remaining_ms == 600_000 + 5_000 - 400


@interpreted_only
def test_the_decision_log_tells_the_story_and_costs_nothing_when_off() -> None:
    for is_on in (False, True):
        world = World(load_ms=100, has_decision_log=is_on)
        for name in ("b1", "b2"):
            world.backend(name, 1, "AB", max_models=1, resident="A")
        kinds: list[tuple[str, str]] = []
        core, handle = world.core, world.core.handle

        def listen(event, now_ms, handle=handle, kinds=kinds):  # type: ignore[no-untyped-def]
            effects = handle(event, now_ms)
            kinds += [(decision.kind, decision.model) for decision in effects.decisions]
            return effects

        core.handle = listen  # type: ignore[method-assign]
        world.run("A", "b1")
        world.run("A", "b2")
        world.ask("B")
        assert granted(world.done("A1")) == []
        world.advance(101)
        world.submit("no", "X")
        if is_on:
            assert kinds[:3] == [("grant", "A"), ("grant", "A"), ("reserve", "B")]
            assert ("load", "B") in kinds
            assert ("release", "B") in kinds
            assert ("grant", "B") in kinds
            assert kinds[-1] == ("reject", "X")
        else:
            assert kinds == []


def test_an_executor_that_comes_full_is_drained_for_who_waited_for_it() -> None:
    """As after a restart of the scheduler: nobody else's end would ever look for them."""
    world = World(load_ms=1_000, equalization_ms=100)
    world.backend("b1", 2, "AB", max_models=1, resident="A")
    running = world.run("AA", "b1")
    world.ask("AB")
    world.disconnect("b1")
    world.advance(2_000)
    assert world.core.snapshot(world.now_ms, 0).executors == ()
    holds = tuple(held(name) for name in running)
    world.backend("b1", 2, "AB", max_models=1, resident="A", holds=holds)
    assert world.places(*running) == ["b1", "b1"]
    assert world.reservation("b1") == "B"


def test_an_executor_that_serves_again_while_it_is_full_is_drained_for_who_waits() -> None:
    world = World(load_ms=1_000, equalization_ms=100)
    world.backend("b1", 2, "AB", max_models=1, resident="A")
    world.backend("b2", 1, "AB", max_models=0)
    world.run("AA", "b1")
    world.drain("b1")
    world.ask("BA")
    world.advance(1_000)
    world.undrain("b1")
    assert world.reservation("b1") == "B"


def test_an_executor_whose_last_idle_model_is_granted_is_drained_for_who_waits() -> None:
    """D is idle until then, but there is no slot for B; D goes first when there is one."""
    world = World(load_ms=1_000, equalization_ms=100)
    world.backend("b1", 2, "BCD", max_models=2, resident="CD")
    world.ask("CC")
    world.ask("B", band=1)
    world.ask("D")
    world.advance(1_000)
    assert world.reservation("b1") is None
    world.done("C1")
    assert world.place("D1") == "b1"
    assert world.reservation("b1") == "B"


def test_a_drain_ends_when_the_model_is_on_its_way_to_an_executor_that_serves_again() -> None:
    world = World(load_ms=1_000, equalization_ms=100)
    world.backend("b1", 1, "B", max_models=1)
    world.backend("b2", 2, "AB", max_models=1, resident="A")
    world.run("A", "b2")
    [waiting] = world.ask("B")
    world.drain("b1")
    world.advance(200)
    assert world.reservation("b2") == "B"
    world.undrain("b1")
    assert world.reservation("b2") is None
    world.advance(800)
    assert world.place(waiting) == "b1"


def test_a_drain_ends_when_its_model_comes_to_its_limit() -> None:
    world = two_homes(model_limits={"B": 1})
    first, second = world.ask("BB")
    assert world.reservation("b1") == "B"
    world.backend("b3", 2, "B", resident="B")
    assert world.places(first, second) == ["b3", None]
    assert world.reservation("b1") is None


def test_a_drain_that_does_not_end_is_given_up_and_looked_for_anew() -> None:
    """Somebody who was to end before the drain did, does not."""
    world = World()
    world.backend("b1", 2, "AB", max_models=1, resident="A")
    [measured] = world.run("A", "b1")
    world.advance(10_000)
    ref = ("b1", world.sessions["b1"], measured, EPOCH, 1)
    world.handle(LeaseEnded(*ref, LeaseOutcome.COMPLETED, num_generated_tokens=100))
    [ends] = world.ask("A", execution_timeout_ms=20_000)
    world.backend("b2", 1, "A", resident="A")
    world.run("A", "b2")
    world.ask("B")
    [hangs] = world.ask("A", max_tokens=10)
    assert (world.reservation("b1"), world.place(hangs)) == ("B", "b1")
    world.advance(10_000)
    world.done(ends)
    world.advance(14_999)
    assert world.core.decisions["reserved.drain"] == 1
    world.advance(2)
    assert world.core.decisions["reserved.drain"] == 2
    row = world.row("b1").reservation
    assert row is not None
    assert row.age_ms <= 1


def test_an_executor_that_may_have_fewer_models_than_it_has_is_drained_for_who_waits() -> None:
    """A at work and B idle, where one model may be from now on: without B there is no room yet."""
    world = World(equalization_ms=1_000)
    world.backend("b1", 2, "ABC", max_models=2, resident="AB")
    [running] = world.run("A", "b1")
    world.change("b1", 2, max_models=1)
    [waiting] = world.ask("C")
    assert world.reservation("b1") is None, "A has no other home"
    world.advance(1_000)
    assert world.reservation("b1") == "C"
    world.done(running)
    assert world.place(waiting) == "b1"
    assert world.row("b1").resident_models == ("C",)


def test_a_drain_takes_as_many_models_from_work_as_must_leave() -> None:
    world = World(equalization_ms=1_000)
    world.backend("b1", 4, "ABCD", max_models=3, resident="ABC")
    running = world.run("AB", "b1")
    world.change("b1", 4, max_models=1)
    [waiting] = world.ask("D")
    world.advance(1_000)
    assert world.reservation("b1") == "D"
    world.done(running[0])
    assert (world.reservation("b1"), world.place(waiting)) == ("D", None)
    world.done(running[1])
    assert world.place(waiting) == "b1"


def test_an_executor_that_may_have_more_models_loads_what_it_is_drained_for_at_once() -> None:
    world = World(equalization_ms=1_000)
    world.backend("b1", 2, "AB", max_models=1, resident="A")
    world.run("A", "b1")
    [waiting] = world.ask("B")
    world.advance(1_000)
    assert world.reservation("b1") == "B"
    world.change("b1", 2, max_models=2)
    assert world.place(waiting) == "b1"
    assert world.row("b1").resident_models == ("A", "B")
