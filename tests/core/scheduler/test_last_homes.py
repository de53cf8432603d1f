"""Last homes: counted together, sliced in time for who has aged, and what else changes for them."""

from typing import Any

import pytest

from scheduler_svc.core import drain
from scheduler_svc.core.messages import ExecutorCapacityChanged
from tests.core.scheduler.helpers import interpreted_only
from tests.core.scheduler.test_drain import two_homes
from tests.core.scheduler.test_scenarios import World


def test_homes_are_counted_together() -> None:
    """W4: B has b1; C must not take b2, the only home that A has left."""
    world = two_homes()
    world.ask("B")
    world.ask("C")
    assert [world.reservation(name) for name in ("b1", "b2")] == ["B", None]
    assert world.place(world.ask("A")[0]) == "b2"


def test_a_home_that_goes_away_ends_the_reservation_of_the_other() -> None:
    world = two_homes()
    world.ask("B")
    world.drain("b2")
    assert world.reservation("b1") is None
    world.undrain("b2")
    world.ask("C")
    assert world.reservation("b1") is not None


def test_a_sole_home_is_sliced_once_the_waiter_has_aged() -> None:
    """W1: B starts within E + what runs + the load, against an endless stream of A."""
    world = World(equalization_ms=5_000, load_ms=500, hold_ms=3_000)
    world.backend("b1", 2, "AB", max_models=1, resident="A")
    world.run_ms = {"A": 1_000}
    world.ask("AA")
    [b] = world.ask("B")
    for _ in range(50):
        if world.place(b) is None:
            world.ask("A")
            world.advance(300)
    assert world.place(b) == "b1"
    assert world.now_ms <= 1_000 + 5_000 + 1_000 + 500 + 300
    assert world.core.decisions["reserved.time_slice"] == 1


def test_a_sliced_home_stays_for_a_while() -> None:
    """W6: after a switch that took 500 ms none is forced for 5 s at a share of 0.1."""
    world = World(equalization_ms=100, load_ms=500, switch_time_share=0.1)
    world.backend("b1", 2, "AB", max_models=1, resident="A")
    world.run_ms = {"A": 50, "B": 50}
    end_ms = world.now_ms + 60_000
    while world.now_ms < end_ms:
        if world.core.num_waiting < 12:
            world.ask("AAABBB")
        world.advance(25)
    switches = world.core.decisions["load.forced"]
    assert 0.5 * 60_000 / 5_500 <= switches <= 60_000 / 5_000 + 1


def test_a_time_slice_ends_a_drain_that_would_leave_nobody_a_home() -> None:
    """C aged past the bonus and slices b1; B, younger, must not drain b2 at the same time."""
    world = two_homes(equalization_ms=5_000)
    world.backend("b3", 1, "A", max_models=1, resident="A")
    world.run("A", "b3")
    world.drain("b3")
    [b] = world.ask("B")
    assert world.reservation("b1") == "B"
    world.cancel(b)
    world.ask("C")
    assert world.reservation("b1") == "C"
    world.advance(4_000)
    world.ask("B")
    world.drain("b2")
    assert world.reservation("b1") is None
    world.advance(1_001)
    row = world.row("b1").reservation
    assert row is not None
    assert (row.model, row.reason) == ("C", "time_slice")


def test_an_old_request_behind_young_heads_slices_a_sole_home_after_twice_e() -> None:
    """Whoever is first gives up after a second, and somebody new comes."""
    world = World(equalization_ms=5_000)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    world.run("A", "b1")
    world.ask("B", band=1)
    [young] = world.ask("B", band=0)
    for _ in range(9):
        world.advance(1_000)
        assert world.reservation("b1") is None
        [next_one] = world.ask("B", band=0)
        world.cancel(young)
        young = next_one
    world.advance(1_001)
    assert world.reservation("b1") == "B"


def test_a_home_is_the_last_one_also_of_a_model_at_work_where_another_drain_is() -> None:
    """B drains e1, where A works: e2, which A could still be loaded on, must not be drained too."""
    world = World(equalization_ms=5_000)
    world.backend("e1", 2, "AB", max_models=1, resident="A")
    world.run("A", "e1")
    world.backend("e2", 2, "ACD", max_models=1, resident="C")
    world.run("C", "e2")
    world.backend("e3", 2, "C", max_models=1, resident="C")
    world.ask("B")
    world.ask("D")
    assert [world.reservation(name) for name in ("e1", "e2")] == ["B", None]


def test_a_drain_of_who_aged_becomes_a_time_slice_when_the_other_home_goes() -> None:
    world = two_homes(equalization_ms=5_000)
    world.ask("B")
    world.advance(6_000)
    world.drain("b2")
    row = world.row("b1").reservation
    assert row is not None
    assert (row.model, row.reason, row.age_ms) == ("B", "time_slice", 6_000)


def test_a_time_slice_ends_a_younger_drain_that_leaves_nobody_a_home() -> None:
    """B drains b1 while A has b2; C, which is older and may have b2 only, slices that one."""
    world = World(equalization_ms=5_000)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    world.run("A", "b1")
    world.backend("b2", 1, "AC", max_models=1, resident="A")
    world.run("A", "b2")
    world.drain("b1")
    world.ask("C")
    assert world.reservation("b2") is None, "the last home of A"
    world.advance(1_000)
    world.undrain("b1")
    world.ask("B")
    assert [world.reservation(name) for name in ("b1", "b2")] == ["B", None]
    world.advance(4_001)
    assert [world.reservation(name) for name in ("b1", "b2")] == [None, "C"]
    world.advance(1_000)
    rows = [world.row(name).reservation for name in ("b1", "b2")]
    assert [row.reason for row in rows if row is not None] == ["time_slice", "time_slice"]


def two_who_want_each_others_home(world: World) -> None:
    """C's old request is overdue and may drain b1; A, which is older still, may then slice b2. C
    has a young request of the first band too."""
    world.backend("b1", 1, "ABC", max_models=1, resident="A")
    world.run("A", "b1")
    world.backend("b2", 1, "AB", max_models=1, resident="B")
    world.run("B", "b2")
    world.ask("AAAAAA")
    world.ask("C", band=1)
    world.advance(300)
    world.ask("C", band=0)
    world.advance(201)


BANDS: dict[str, Any] = {"num_bands": 2, "band_max_wait_ms": (300, 500)}


def test_a_drain_for_an_old_head_of_a_later_band_is_a_time_slice_once_nobody_else_is_home() -> None:
    """Its right to b1 is its own: a young head of its model in an earlier band has none."""
    world = World(equalization_ms=400, **BANDS)
    two_who_want_each_others_home(world)
    world.change("b1", 1)
    rows = [world.row(name).reservation for name in ("b1", "b2")]
    assert [(row.model, row.reason) for row in rows if row is not None] == [
        ("C", "time_slice"),
        ("A", "time_slice"),
    ]


@interpreted_only
def test_a_circle_of_reservations_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fault in the rules: the drain of C ends, as somebody younger is taken for its owner,
    so the slice of A has no purpose, so C drains again."""
    monkeypatch.setattr(drain, "_owner", lambda state, other: state.queue.head(other.model))
    world = World(equalization_ms=400, **BANDS)
    two_who_want_each_others_home(world)
    resized = ExecutorCapacityChanged("b1", world.sessions["b1"], 1, 1)
    world.core.handle(resized, world.now_ms)
    assert world.core.decisions["circle_cut"]
    assert world.core.next_deadline_ms() == world.now_ms + 100


def test_a_model_that_loses_its_home_to_a_drain_may_be_loaded_elsewhere_at_once() -> None:
    """One more place was not worth its load to A; a first one is."""
    world = World(load_ms=1_000, equalization_ms=5_000)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    [measured] = world.run("A", "b1")
    world.advance(400)
    world.done(measured)
    world.run("A", "b1")
    world.backend("b2", 1, "A", max_models=1)
    [a] = world.ask("A")
    world.ask("B")
    world.advance(4_900)
    assert (world.reservation("b1"), world.row("b2").loading_model) == (None, None)
    world.advance(101)
    assert (world.reservation("b1"), world.row("b2").loading_model) == ("B", "A")
    world.advance(1_000)
    assert world.place(a) == "b2"
