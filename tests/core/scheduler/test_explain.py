"""The decision log: one line for each decision, and the same decisions without it."""

import pytest

from scheduler_svc.core import explain
from scheduler_svc.core.messages import Decision, Effects, Event
from tests.core.scheduler.helpers import Driver, interpreted_only
from tests.core.scheduler.test_drain import measured_drain
from tests.core.scheduler.test_handover import Script
from tests.core.scheduler.test_scenarios import World


class Told:
    """What a driver's core says of its decisions, from now on."""

    def __init__(self, driver: Driver) -> None:
        self.decisions: list[Decision] = []
        self._handle = driver.core.handle
        # to listen is the only purpose: what it did before, it does still
        driver.core.handle = self._listen  # type: ignore[method-assign]

    def _listen(self, event: Event, now_ms: int) -> Effects:
        effects = self._handle(event, now_ms)
        self.decisions += effects.decisions
        return effects

    def last(self, kind: str) -> str:
        """The text of the latest of a kind."""
        return next(one.text for one in reversed(self.decisions) if one.kind == kind)


@interpreted_only
def test_a_grant_says_how_it_ranked_where_it_went_and_why_there() -> None:
    driver = Driver(has_decision_log=True, warm_bonus=10, aging_equalization_ms=30_000)
    told = Told(driver)
    driver.attach("e1", num_slots=4)
    driver.attach("e2", num_slots=2)
    driver.submit("a", session_id="s", prefix_hashes=(1, 2, 3))
    assert told.last("grant") == (
        "to e1 after 0 ms, band 0, priority 10.0: least used; used slots: e1 0/4, e2 0/2"
    )
    driver.end("a")
    driver.submit("fills", num_samples=1)
    assert told.last("grant").startswith("to e2 ")
    driver.submit("b", session_id="s")
    assert told.last("grant").startswith("to e1 after 0 ms, band 0, priority 10.0: its session was")
    driver.submit("c", prefix_hashes=(1, 2, 9))
    assert "to e1 after 0 ms, band 0, priority 10.0: 2 blocks of its prompt" in told.last("grant")


@interpreted_only
def test_a_grant_tells_a_band_that_was_left_behind_and_fifo_has_no_priority() -> None:
    driver = Driver(has_decision_log=True, warm_bonus=0, band_max_wait_ms=(10**6, 10**6, 3_000))
    told = Told(driver)
    driver.attach("e1")
    driver.submit("runs")
    driver.submit("late", band=2)
    driver.advance(3_000)
    driver.submit("young", band=1)
    driver.end("runs")
    assert told.last("grant") == (
        "to e1 after 3000 ms, band 2 counting as 0: least used; used slots: e1 0/1"
    )


@interpreted_only
def test_drains_and_loads_name_their_candidates() -> None:
    world = World(load_ms=1_000, has_decision_log=True)
    told = Told(world)
    world.run_ms = {"A": 5_000}
    for name in ("b1", "b2", "b3"):
        world.backend(name, 1, "AB", max_models=1, resident="A")
    world.ask("AAA")
    world.advance(5_000)
    world.run("A", "b1")
    world.advance(1_000)
    world.ask("AA")
    world.advance(500)
    world.ask("B")
    assert told.last("reserve") == (
        "drain on b1; expected empty: b1 in 3500 ms, b2 in 4500 ms, b3 in 4500 ms"
    )
    world.advance(3_500)
    assert "drain on b1: load begins" in [one.text for one in told.decisions]
    assert told.last("reserve") == "load on b1"
    assert told.last("load") == (
        "forced switch on b1, for 1 that waited 3500 ms together; "
        "candidates: b1 0/1 in 1000 ms evicting A"
    )


@interpreted_only
def test_a_wide_claim_and_a_backfill_say_so() -> None:
    world = measured_drain(has_decision_log=True)
    told = Told(world)
    world.ask("A", max_tokens=5)
    assert "will end before the drain for B does; used slots: none" in told.last("grant")

    driver = Driver(has_decision_log=True)
    told = Told(driver)
    driver.attach(num_slots=3)
    driver.submit("a")
    driver.submit("b")
    driver.submit("wide", num_samples=3)
    assert told.last("reserve") == "wide on e1; slots missing: 2"


def test_a_line_names_a_few_and_counts_the_others() -> None:
    assert explain.named([]) == "none"
    assert explain.named(["a", "b"]) == "a, b"
    assert explain.named(list("abcdef")) == "a, b, c, d and 2 more"


@pytest.mark.parametrize("seed", range(6))
def test_the_same_is_decided_with_the_log_and_without_it(seed: int) -> None:
    assert Script(seed).run(300) == Script(seed, has_decision_log=True).run(300)
