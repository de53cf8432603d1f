"""Executors that come, go and come back; what becomes of their leases."""

from headway.reasons import Reason
from scheduler_svc.core.messages import (
    ExecutorDrained,
    ExecutorWelcomed,
    LeaseAcknowledged,
    LeaseAdopted,
    LeaseGranted,
    LeaseOutcome,
    LeaseRevoked,
    SessionClosed,
)
from tests.core.scheduler.helpers import EPOCH, Driver, finished, granted, held, of_type


def test_scenario_23_a_lost_executors_leases_are_in_doubt_until_it_is_back() -> None:
    driver = Driver()
    driver.attach(num_slots=3)
    driver.submit("a")
    driver.submit("b", num_samples=2)
    driver.disconnect()
    row = driver.row()
    assert (row.state, row.num_free, row.num_leased, row.num_in_doubt) == ("lost", 0, 0, 3)
    assert driver.core.current_lease("a") is None
    assert driver.status("a").is_running
    sent = driver.attach(num_slots=3, holds=(held("a"), held("b", ended=True)))
    assert sent == [
        ExecutorWelcomed("e1", 2),
        LeaseAdopted("e1", 2, "a", EPOCH, 1, 2),
        LeaseAdopted("e1", 2, "b", EPOCH, 1, 2),
    ]
    assert (driver.row().num_leased, driver.row().num_in_doubt) == (3, 0)
    assert finished(driver.end("a", attempt=2)) == {"a": None}


def test_scenario_23_what_it_does_not_name_goes_back_at_once() -> None:
    driver = Driver(max_attempts=1)
    driver.attach(num_slots=2)
    for name in "abc":
        driver.submit(name)
    driver.disconnect()
    sent = driver.attach(num_slots=2, holds=(held("b"),))
    assert sent == [
        ExecutorWelcomed("e1", 2),
        LeaseAdopted("e1", 2, "b", EPOCH, 1, 2),
        LeaseGranted("e1", 2, "a", 2),
    ]


def test_scenario_23_a_new_process_holds_nothing() -> None:
    driver = Driver()
    driver.attach(num_slots=2)
    driver.submit("a")
    driver.submit("b")
    driver.disconnect()
    sent = driver.attach(num_slots=2, incarnation="i2")
    assert granted(sent) == [("a", "e1"), ("b", "e1")]
    assert driver.core.decisions["requeued.executor_restarted"] == 2


def test_scenario_23_after_the_grace_the_record_is_gone() -> None:
    driver = Driver(executor_grace_ms=1_000)
    driver.attach()
    driver.submit("a")
    driver.disconnect()
    driver.advance(999)
    assert driver.status("a").is_running
    driver.advance(1)
    assert not driver.status("a").is_running
    assert driver.core.snapshot(driver.now_ms, 0).executors == ()


def test_scenario_24_orders_about_unknown_executors_do_nothing() -> None:
    driver = Driver()
    driver.sessions["nobody"] = 1
    assert driver.drain("nobody") + driver.undrain("nobody") == []
    assert driver.resize("nobody", 5) + driver.disconnect("nobody") == []
    assert driver.end("a", "nobody") == []


def test_lost_requests_go_to_the_head_of_their_flow() -> None:
    driver = Driver(executor_grace_ms=0)
    driver.attach("e1", num_slots=2)
    driver.submit("a")
    driver.submit("b")
    driver.submit("c")
    driver.disconnect("e1")
    driver.advance(0)
    assert [driver.status(name).position for name in "abc"] == [0, 1, 2]
    assert granted(driver.attach("e2", num_slots=3)) == [("a", "e2"), ("b", "e2"), ("c", "e2")]


def test_losses_exhaust_the_attempts() -> None:
    driver = Driver(max_attempts=2)
    driver.attach()
    driver.submit("poison")
    driver.attach(incarnation="i2")
    sent = driver.attach(incarnation="i3")
    assert finished(sent) == {"poison": Reason.ATTEMPTS_EXHAUSTED}
    assert driver.row().num_free == 1


def test_an_adopted_lease_is_no_crash() -> None:
    driver = Driver(max_attempts=1)
    driver.attach()
    driver.submit("a")
    for attempt in range(1, 6):
        driver.disconnect()
        driver.attach(holds=(held("a", attempt),))
    assert driver.core.current_lease("a") == ("e1", 6, 6)


def test_a_request_back_in_the_queue_is_adopted_by_who_still_holds_it() -> None:
    driver = Driver(executor_grace_ms=100)
    driver.attach()
    driver.submit("a")
    driver.disconnect()
    driver.advance(100)
    assert driver.core.num_waiting == 1
    sent = driver.attach(holds=(held("a"),))
    assert sent == [ExecutorWelcomed("e1", 2), LeaseAdopted("e1", 2, "a", EPOCH, 1, 2)]
    assert driver.core.num_waiting == 0


def test_an_adoption_whose_answer_was_lost_is_repeated() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.attach(holds=(held("a", 1),))
    sent = driver.attach(holds=(held("a", 1),))
    assert of_type(sent, LeaseAdopted) == [LeaseAdopted("e1", 3, "a", EPOCH, 1, 3)]
    assert driver.row().num_leased == 1


def test_a_lease_of_an_earlier_scheduler_is_adopted_if_its_request_waits() -> None:
    driver = Driver()
    driver.attach("e1")
    driver.submit("first")
    driver.submit("a")
    sent = driver.attach("e2", holds=(held("a", attempt=4, epoch=EPOCH - 1),))
    assert sent[1] == LeaseAdopted("e2", 1, "a", EPOCH - 1, 4, 1)
    assert finished(driver.end("a", "e2", attempt=1)) == {"a": None}


def test_what_is_over_or_unknown_is_acknowledged_if_it_ended_else_revoked() -> None:
    driver = Driver()
    sent = driver.attach(holds=(held("x", ended=True), held("y")))
    assert sent == [
        ExecutorWelcomed("e1", 1),
        LeaseAcknowledged("e1", 1, "x", EPOCH, 1),
        LeaseRevoked("e1", 1, "y", EPOCH, 1),
    ]
    assert driver.row().num_leased == 1
    driver.end("y", outcome=LeaseOutcome.REVOKED)
    assert driver.row().num_free == 1


def test_what_is_leased_elsewhere_is_not_adopted() -> None:
    driver = Driver(executor_grace_ms=100)
    driver.attach("e1", num_slots=2)
    driver.submit("a", num_samples=2)
    driver.disconnect("e1")
    driver.attach("e2", num_slots=2)
    driver.advance(100)
    assert driver.core.current_lease("a") == ("e2", 1, 2)
    holds = (held("a", 1, num_slots=2),)
    sent = driver.attach("e1", num_slots=2, holds=holds)
    assert sent == [ExecutorWelcomed("e1", 2), LeaseRevoked("e1", 2, "a", EPOCH, 1)]
    assert driver.row("e1").num_leased == 2
    assert driver.core.current_lease("a") == ("e2", 1, 2)
    driver.end("a", "e1", attempt=1)
    assert driver.core.current_lease("a") == ("e2", 1, 2)
    driver.attach("e1", num_slots=2, holds=holds)
    # lost again before it confirms: neither a crash of the request nor an adoption
    driver.attach("e1", num_slots=2, incarnation="i2")
    assert driver.core.current_lease("a") == ("e2", 1, 2)


def test_an_attempt_that_was_never_granted_is_not_believed() -> None:
    driver = Driver()
    driver.attach("e1")
    driver.submit("a")
    driver.submit("b")
    sent = driver.attach("e1", holds=(held("a", 1), held("a", 2), held("b", 1)))
    assert sent[2:] == [LeaseAdopted("e1", 2, "a", EPOCH, 1, 2)]
    assert not driver.status("b").is_running


def test_a_cancelled_lease_keeps_its_slots_through_a_broken_session() -> None:
    driver = Driver()
    driver.attach(num_slots=2)
    driver.submit("a", num_samples=2)
    driver.submit("b")
    driver.cancel("a")
    driver.disconnect()
    sent = driver.attach(num_slots=2, holds=(held("a"),))
    assert sent[1:] == [LeaseRevoked("e1", 2, "a", EPOCH, 1)]
    assert driver.row().num_leased == 2
    assert granted(driver.end("a", outcome=LeaseOutcome.REVOKED)) == [("b", "e1")]


def test_cancelled_while_its_executor_is_away() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.disconnect()
    assert finished(driver.cancel("a")) == {"a": Reason.CANCELLED}
    assert driver.row().num_in_doubt == 1
    sent = driver.attach(holds=(held("a", ended=True),))
    assert sent[1:] == [LeaseAcknowledged("e1", 2, "a", EPOCH, 1)]
    assert driver.row().num_free == 1


def test_a_second_session_closes_the_first() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    sent = driver.attach(holds=(held("a"),))
    assert isinstance(sent[0], SessionClosed)
    assert sent[0].session == 1
    assert sent[1:] == [ExecutorWelcomed("e1", 2), LeaseAdopted("e1", 2, "a", EPOCH, 1, 2)]


def test_an_executor_may_come_back_with_other_models_and_slots() -> None:
    driver = Driver()
    driver.attach(num_slots=1, models="A")
    driver.submit("a0")
    driver.submit("a1")
    driver.attach(num_slots=4, models="B", holds=(held("a0"),))
    assert granted(driver.submit("b", "B")) == [("b", "e1")]
    assert granted(driver.end("a0", attempt=2)) == []
    assert granted(driver.attach("e2", models="A")) == [("a1", "e2")]


def test_draining_takes_nothing_new_and_says_when_it_is_empty() -> None:
    driver = Driver()
    driver.attach(num_slots=2)
    driver.submit("a")
    assert driver.drain() == []
    assert driver.row().state == "draining"
    driver.attach("e2", models="A", num_slots=1)
    assert granted(driver.submit("b")) == [("b", "e2")]
    assert driver.end("a")[-1] == ExecutorDrained("e1", 1)
    assert driver.drain() == []
    driver.submit("c")
    assert granted(driver.undrain()) == [("c", "e1")]


def test_an_empty_executor_is_drained_at_once_and_again_in_a_new_session() -> None:
    driver = Driver()
    driver.attach()
    assert driver.drain() == [ExecutorDrained("e1", 1)]
    assert driver.attach()[-1] == ExecutorDrained("e1", 2)
    assert of_type(driver.attach(incarnation="i2"), ExecutorDrained) == []
    assert driver.row().state == "attached"


def test_an_empty_executor_is_drained_once_in_a_session_whatever_else_it_says() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.drain()
    assert of_type(driver.end("a"), ExecutorDrained) == [ExecutorDrained("e1", 1)]
    assert of_type(driver.end("a") + driver.end("a"), ExecutorDrained) == []


def test_an_executor_that_was_forgotten_comes_back_without_its_statistics() -> None:
    driver = Driver(executor_grace_ms=100)
    driver.attach()
    for name in ("a", "b"):
        driver.submit(name, session_id="s")
        driver.end(name)
    stats = driver.row().stats
    assert stats is not None
    assert (stats.num_leases, stats.affinity) == (2, 1.0)
    driver.disconnect()
    driver.advance(101)
    driver.attach()
    stats = driver.row().stats
    assert stats is not None
    assert (stats.num_leases, stats.affinity) == (0, None)
