"""Where requests run: slots, shares, turns, wide requests and their claims."""

import pytest

from scheduler_svc.core.domain import ExecutorRecord
from scheduler_svc.core.messages import ExecutorAttached, LeaseOutcome, ModelOffer
from scheduler_svc.core.shelves import Shelf
from tests.core.scheduler.helpers import Driver, granted


def test_scenario_19_models_share_an_executor_up_to_its_slots() -> None:
    driver = Driver()
    driver.attach(num_slots=2, models="AB")
    sent = driver.submit("a", "A") + driver.submit("b", "B") + driver.submit("c", "A")
    assert granted(sent) == [("a", "e1"), ("b", "e1")]
    assert driver.row().num_free == 0


def test_scenario_21_ending_twice_frees_nothing_that_is_not_its_own() -> None:
    driver = Driver()
    driver.attach(num_slots=2)
    driver.submit("a")
    driver.submit("b")
    driver.end("a")
    for _ in range(3):
        driver.end("a")
    assert (driver.row().num_free, driver.row().num_leased) == (1, 1)
    assert driver.core.is_live("b")


def test_scenario_22_capacity_below_use_kills_nothing_and_takes_nothing() -> None:
    driver = Driver()
    driver.attach(num_slots=3)
    for name in "abcd":
        driver.submit(name)
    driver.resize("e1", 1)
    row = driver.row()
    assert (row.num_slots, row.num_free, row.num_leased) == (1, 0, 3)
    assert granted(driver.end("a") + driver.end("b")) == []
    assert granted(driver.end("c")) == [("d", "e1")]


def test_capacity_raised_takes_more_at_once() -> None:
    driver = Driver()
    driver.attach(num_slots=0)
    driver.submit("a")
    assert driver.core.num_waiting == 1
    assert granted(driver.resize("e1", 1)) == [("a", "e1")]


def test_scenario_25_a_blocked_head_does_not_block_other_models() -> None:
    driver = Driver()
    driver.attach("e1", models="A")
    driver.attach("e2", models="B")
    driver.submit("a0", "A")
    driver.submit("b0", "B")
    driver.submit("a1", "A")
    driver.submit("b1", "B")
    assert granted(driver.end("b0", "e2")) == [("b1", "e2")]
    assert driver.core.num_waiting == 1


def test_scenario_26_arrival_order_without_diversity() -> None:
    driver = Driver()
    driver.attach(num_slots=2, models="AB")
    driver.submit("running", "A")
    assert granted(driver.submit("a", "A") + driver.submit("b", "B")) == [("a", "e1")]


def test_scenario_40_a_burst_in_one_millisecond_keeps_its_order() -> None:
    driver = Driver()
    driver.attach("e1", models="A")
    driver.submit("running")
    names = [f"r{number}" for number in range(200)]
    for name in names:
        driver.submit(name)
    order, last = [], "running"
    for _ in names:
        [(last, _)] = granted(driver.end(last))
        order.append(last)
    assert order == names


def test_scenario_54_least_used_share_goes_first() -> None:
    driver = Driver()
    driver.attach("small", num_slots=2)
    driver.attach("large", num_slots=4)
    places = [granted(driver.submit(f"r{n}"))[0][1] for n in range(6)]
    # shares (small, large) before each: 0 0, 1/2 0, 1/2 1/4, 1/2 1/2, 1 1/2, 1 3/4
    assert places == ["small", "large", "large", "small", "large", "large"]


def test_scenario_54_equal_shares_alternate_for_each_model_alone() -> None:
    driver = Driver()
    driver.attach("e1", num_slots=1, models="AB")
    driver.attach("e2", num_slots=8, models="AB")

    def run(name: str, model: str) -> str:
        [(_, executor_id)] = granted(driver.submit(name, model))
        driver.end(name, executor_id)
        return executor_id

    turns = [run(f"{model}{n}", model) for n in range(4) for model in "AB"]
    assert turns == ["e1", "e1", "e2", "e2", "e1", "e1", "e2", "e2"]


def test_a_model_that_is_offered_but_not_resident_is_not_placed() -> None:
    driver = Driver()
    driver.attach("e1", models="A")
    driver.sessions["e2"] = 1
    offers = (ModelOffer("A", is_resident=False),)
    driver.handle(ExecutorAttached("e2", 1, "i1", 4, 1, offers))
    assert granted(driver.submit("a") + driver.submit("b")) == [("a", "e1")]


def test_samples_take_slots_but_no_more_than_there_are() -> None:
    driver = Driver()
    driver.attach("e1", num_slots=4)
    driver.submit("a", num_samples=3)
    assert driver.row().num_leased == 3
    driver.end("a")
    driver.submit("b", num_samples=100)
    assert driver.row().num_leased == 4


def test_nothing_jumps_over_a_wide_head_of_its_model() -> None:
    driver = Driver()
    driver.attach(num_slots=2)
    driver.submit("a")
    driver.submit("wide", num_samples=2)
    assert granted(driver.submit("b") + driver.submit("c", band=1)) == []
    assert granted(driver.end("a")) == [("wide", "e1")]


def test_a_wide_head_is_not_starved_by_other_models() -> None:
    driver = Driver()
    driver.attach(num_slots=2, models="AB")
    driver.submit("b0", "B")
    driver.submit("b1", "B")
    driver.submit("wide", "A", num_samples=2)
    for name in ("b2", "b3"):
        driver.submit(name, "B")
    assert granted(driver.end("b0")) == []
    assert granted(driver.end("b1")) == [("wide", "e1")]
    assert granted(driver.end("wide")) == [("b2", "e1"), ("b3", "e1")]


def test_a_claim_yields_to_who_ranks_before_it() -> None:
    driver = Driver()
    driver.attach(num_slots=2, models="AB")
    driver.submit("b0", "B", band=1)
    driver.submit("wide", "A", band=1, num_samples=2)
    assert granted(driver.submit("urgent", "B", band=0)) == [("urgent", "e1")]


def test_a_claim_ends_with_its_request_and_with_its_executor() -> None:
    driver = Driver()
    driver.attach("e1", num_slots=2, models="AB")
    driver.submit("b0", "B")
    driver.submit("wide", "A", num_samples=2)
    driver.submit("b1", "B")
    assert granted(driver.cancel("wide")) == [("b1", "e1")]
    driver.end("b1")
    driver.submit("wide2", "A", num_samples=2)
    driver.attach("e2", num_slots=1, models="B")
    assert granted(driver.submit("b2", "B")) == [("b2", "e2")]
    driver.submit("b3", "B")
    assert granted(driver.disconnect("e1")) == []
    assert granted(driver.end("b2", "e2")) == [("b3", "e2")]


def test_a_better_wide_head_takes_a_claim_over() -> None:
    driver = Driver()
    driver.attach(num_slots=3, models="ABC")
    driver.submit("c0", "C")
    driver.submit("c1", "C")
    driver.submit("late", "A", band=1, num_samples=2)
    driver.submit("early", "B", band=0, num_samples=3)
    assert granted(driver.end("c0")) == []
    assert granted(driver.end("c1")) == [("early", "e1")]
    assert granted(driver.end("early")) == [("late", "e1")]


@pytest.mark.parametrize("other", "AB")
def test_a_wide_head_that_is_overdue_is_passed_by_nobody_who_came_later(other: str) -> None:
    """Its claim is as strong as its rank is now, also against an earlier band of its own model."""
    driver = Driver(num_bands=2, band_max_wait_ms=(10_000, 2_000))
    driver.attach(num_slots=2, models="AB")
    driver.submit("first", other)
    driver.submit("wide", "A", band=1, num_samples=2)
    assert granted(driver.submit("second", other)) == [("second", "e1")], "of an earlier band"
    running, order = ["first", "second"], []
    for number in range(6):
        driver.submit(f"single{number}", other)
        driver.advance(500)
        for name, _ in granted(driver.end(running.pop(0))):
            running.append(name)
            order.append(name)
        if "wide" in running:
            break
    assert order == ["single0", "single1", "single2", "wide"]


def test_a_wide_head_of_an_earlier_band_has_the_claim_of_its_model() -> None:
    driver = Driver(num_bands=3, band_max_wait_ms=(60_000,))
    driver.attach(num_slots=2, models="AB")
    driver.submit("b0", "B")
    driver.submit("late", "A", band=2, num_samples=2)
    driver.submit("b1", "B")
    driver.submit("early", "A", band=0, num_samples=2)
    driver.submit("b2", "B", band=1)
    assert granted(driver.end("b0")) == []
    assert granted(driver.end("b1")) == [("early", "e1")]
    assert granted(driver.end("early")) == [("b2", "e1")]


def test_a_wide_request_finds_the_larger_executor_behind_a_less_loaded_one() -> None:
    driver = Driver()
    driver.attach("small", num_slots=2)
    driver.attach("large", num_slots=8)
    driver.submit("a")
    driver.submit("b", num_samples=5)
    assert driver.core.current_lease("a") == ("small", 1, 1)
    assert driver.core.current_lease("b") == ("large", 1, 1)
    # used shares 1/2 and 5/8, but two slots are free on the large one only
    assert granted(driver.submit("c", num_samples=2)) == [("c", "large")]


def test_scenario_59_a_slot_is_given_back_once_whatever_the_end() -> None:
    for outcome in (LeaseOutcome.COMPLETED, LeaseOutcome.FAILED, LeaseOutcome.RETURNED):
        driver = Driver()
        driver.attach(num_slots=2)
        driver.submit("a")
        driver.end("a", outcome=outcome)
        num_leased = 1 if outcome is LeaseOutcome.RETURNED else 0
        assert driver.row().num_leased == num_leased


def test_the_longest_cached_prefix_goes_before_a_shorter_one() -> None:
    driver = Driver()
    driver.attach("short", num_slots=4)
    driver.submit("a", prefix_hashes=(1,))
    driver.resize("short", 0)
    driver.attach("long", num_slots=4)
    driver.submit("b", prefix_hashes=(1, 2, 3))
    driver.submit("c")
    driver.resize("short", 4)
    assert [driver.row(name).num_free for name in ("short", "long")] == [3, 2]
    assert granted(driver.submit("d", prefix_hashes=(1, 2, 3, 4))) == [("d", "long")]
    assert granted(driver.submit("e", prefix_hashes=(1, 9))) == [("e", "short")]


def test_an_executor_stands_in_the_row_of_its_size_alone() -> None:
    shelf, executor = Shelf(), ExecutorRecord("e1", "i1", 1, num_slots=2)
    shelf.put(executor, 0, 1)
    executor.num_slots = 4
    shelf.put(executor, 0, 1)
    assert {size: list(row) for size, row in shelf.rows.items()} == {4: ["e1"]}
    shelf.take("e1")
    assert not shelf.rows


def test_a_claim_of_a_band_that_is_owed_nothing_any_more_bars_nobody() -> None:
    """The grant that band 1 was owed goes to one whose cache is there, and the next is band 2's:
    the wide head of band 1 has no right to go before everybody now."""
    driver = Driver(num_bands=3, band_min_shares=(0.0, 0.3, 0.3))
    driver.attach(num_slots=2)
    driver.submit("before", band=1, tenant="u", session_id="s")
    driver.end("before")
    driver.submit("a0")
    driver.submit("a1")
    driver.submit("wide", band=1, num_samples=2)
    driver.submit("a2")
    driver.submit("late", band=2)
    executor = driver.core._state.fleet.executors["e1"]
    executor.band_credits, executor.owed_band = [0.0, 1.3, 1.2], 1
    driver.end("a0")
    driver.submit("a3")
    assert granted(driver.end("a1")) == [], "one slot is too few for the wide one, and is kept"
    driver.submit("cached", band=1, tenant="u", session_id="s")
    sent = driver.end("a2")
    assert granted(sent) == [("cached", "e1"), ("late", "e1")]
    assert granted(driver.end("late")) == [("a3", "e1")]
    driver.end("cached")
    assert granted(driver.end("a3")) == [("wide", "e1")]
