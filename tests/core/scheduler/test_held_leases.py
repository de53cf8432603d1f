"""What a held lease takes is booked: of executors that were forgotten, of requests that ended."""

from typing import Any

import pytest

from scheduler_svc.core.messages import (
    ExecutorAttached,
    ExecutorWelcomed,
    HeldLease,
    LeaseAdopted,
    LeaseOutcome,
    LeaseRevoked,
    ModelOffer,
)
from tests.core.scheduler.helpers import EPOCH, Driver, granted, held, of_type
from tests.core.scheduler.test_residency import Loading, orders
from tests.core.scheduler.test_scenarios import World

GRACE_MS = 100


def a_driver(**settings: Any) -> Driver:
    """Somebody offers the model at any time, so that requests are let in."""
    driver = Driver(executor_grace_ms=GRACE_MS, **settings)
    driver.attach("e0", num_slots=0, models="AB")
    return driver


def forgotten(driver: Driver, executor_id: str = "e1") -> None:
    """It is away for longer than its grace."""
    driver.disconnect(executor_id)
    driver.advance(GRACE_MS)


def test_slots_of_a_lease_whose_request_ended_meanwhile_stay_taken() -> None:
    driver = a_driver()
    driver.attach(num_slots=4)
    driver.submit("wide", num_samples=3)
    forgotten(driver)
    driver.cancel("wide")
    for name in "ab":
        driver.submit(name)
    sent = driver.attach(num_slots=4, holds=(held("wide", num_slots=3),))
    assert of_type(sent, LeaseRevoked) == [LeaseRevoked("e1", 2, "wide", EPOCH, 1)]
    assert granted(sent) == [("a", "e1")]
    assert (driver.row().num_leased, driver.row().num_free) == (4, 0)
    assert granted(driver.end("wide", outcome=LeaseOutcome.REVOKED)) == [("b", "e1")]


def test_slots_of_a_lease_of_an_earlier_scheduler_stay_taken() -> None:
    """It never knew the request."""
    driver = a_driver()
    driver.submit("a")
    sent = driver.attach(num_slots=2, holds=(held("old", 5, EPOCH - 1, num_slots=2),))
    assert sent == [ExecutorWelcomed("e1", 1), LeaseRevoked("e1", 1, "old", EPOCH - 1, 5)]
    sent = driver.end("old", outcome=LeaseOutcome.REVOKED, attempt=5, epoch=EPOCH - 1)
    assert granted(sent) == [("a", "e1")]


def test_a_forgotten_lease_counts_for_the_limit_of_its_model() -> None:
    driver = a_driver(model_limits={"A": 1})
    driver.attach("e1", num_slots=2)
    driver.submit("first")
    forgotten(driver)
    driver.cancel("first")
    driver.attach("e1", num_slots=2, holds=(held("first"),))
    assert granted(driver.submit("second")) == []
    assert granted(driver.end("first", outcome=LeaseOutcome.REVOKED)) == [("second", "e1")]


def test_a_forgotten_lease_that_vanishes_with_its_executor_frees_the_limit_of_its_model() -> None:
    driver = a_driver(model_limits={"A": 1})
    driver.attach("e1", holds=(held("old", epoch=1),))
    driver.attach("e2")
    assert granted(driver.submit("a")) == []
    driver.disconnect("e1")
    assert granted(driver.advance(GRACE_MS)) == [("a", "e2")]


def test_a_model_stays_while_a_forgotten_lease_of_it_runs_and_others_may_leave() -> None:
    world = Loading()
    offers = tuple(ModelOffer(model, is_resident=model != "B") for model in "ABC")
    world.sessions["b1"] = 1
    ghost = (held("ghost", epoch=3),)
    world.handle(ExecutorAttached("b1", 1, "i1", 2, 2, offers, ghost))
    assert orders(world.submit("b", "B")) == [("b1", "B", ("C",))]


@pytest.mark.parametrize(("others", "reserved_for"), [("C", "B"), ("B", None)])
def test_the_last_home_of_a_model_is_kept_though_only_a_forgotten_lease_runs(
    others: str, reserved_for: str | None
) -> None:
    world = World(load_ms=1_000, equalization_ms=5_000)
    world.backend("b2", 0, "B", max_models=1)
    world.backend("b3", 1, others, max_models=0)
    holds = (held("old", epoch=1, model="C"),)
    world.backend("b1", 2, "BC", max_models=1, resident="C", holds=holds)
    world.ask("B")
    assert world.reservation("b1") == reserved_for


def test_an_adopted_lease_keeps_the_slots_that_it_has() -> None:
    """Its request was back in the queue, and its executor had more slots when it was granted."""
    driver = a_driver()
    driver.attach(num_slots=4)
    driver.submit("wide", num_samples=3)
    forgotten(driver)
    driver.submit("a")
    sent = driver.attach(num_slots=2, holds=(held("wide", num_slots=3),))
    assert of_type(sent, LeaseAdopted) == [LeaseAdopted("e1", 2, "wide", EPOCH, 1, 2)]
    assert (driver.row().num_leased, driver.row().num_free) == (3, 0)
    assert granted(driver.resize("e1", 3)) == []
    assert granted(driver.resize("e1", 4)) == [("a", "e1")]


def test_an_executor_that_holds_more_than_it_may_have_takes_nothing_new() -> None:
    driver = a_driver()
    holds = tuple(held(name, epoch=1, num_slots=2) for name in "xyz")
    driver.attach(num_slots=3, holds=holds)
    row = driver.row()
    assert (row.num_slots, row.num_leased, row.num_free) == (3, 6, 0)
    assert granted(driver.submit("a")) == []
    assert granted(driver.end("x", outcome=LeaseOutcome.REVOKED, epoch=1)) == []
    assert granted(driver.end("y", outcome=LeaseOutcome.REVOKED, epoch=1)) == [("a", "e1")]


def test_of_a_lease_in_its_books_the_scheduler_believes_nobody_else() -> None:
    driver = a_driver(model_limits={"A": 1})
    driver.attach(num_slots=4, models="AB")
    driver.submit("a", num_samples=2)
    for attempt, lie in enumerate((held("a", 1, model="B"), held("a", 2, num_slots=4)), 1):
        driver.disconnect()
        sent = driver.attach(num_slots=4, models="AB", holds=(lie,))
        assert of_type(sent, LeaseAdopted)
        assert driver.row().num_leased == 2, attempt
    assert granted(driver.submit("second")) == [], "the first one is of A, and nothing else"


def test_what_the_request_of_a_lease_asks_for_bounds_what_it_is_believed_to_take() -> None:
    driver = a_driver()
    driver.submit("a", num_samples=2)
    lie = HeldLease("a", 1, 1, "B", 64, has_ended=False)
    sent = driver.attach(num_slots=4, models="AB", holds=(lie,))
    assert of_type(sent, LeaseAdopted) == [LeaseAdopted("e1", 1, "a", 1, 1, 1)]
    assert driver.row().num_leased == 2
    assert driver.row().active_models == ("A",)
