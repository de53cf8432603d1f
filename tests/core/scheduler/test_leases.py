"""Leases: the fence, the ends, the clocks, cancel and revoke."""

import pytest

from headway.reasons import Reason
from scheduler_svc.core.messages import (
    ExecutorDisconnected,
    LeaseAcknowledged,
    LeaseEnded,
    LeaseOutcome,
    LeaseRevoked,
    RequestFinished,
    SessionClosed,
    Tick,
)
from tests.core.scheduler.helpers import EPOCH, Driver, finished, granted, held, of_type


def test_a_finished_request_carries_its_times() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("first")
    driver.submit("a")
    driver.advance(100)
    driver.end("first")
    driver.advance(20)
    driver.start("a")
    driver.advance(300)
    assert driver.end("a")[0] == RequestFinished("a", None, "", 100, 120, 420, 1, model_wait_ms=0)


def test_the_first_token_counts_once_and_only_from_the_current_attempt() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.advance(10)
    driver.end("a", outcome=LeaseOutcome.RETURNED)
    stale = driver.attempts["a"] - 1
    driver.attempts["a"] = stale
    driver.start("a")
    driver.attempts["a"] = stale + 1
    driver.advance(10)
    driver.start("a")
    driver.advance(10)
    driver.start("a")
    [end] = of_type(driver.end("a"), RequestFinished)
    assert isinstance(end, RequestFinished)
    assert (end.first_token_ms, end.num_attempts) == (20, 2)


def test_failed_ends_with_the_executors_reason() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    sent = driver.end("a", outcome=LeaseOutcome.FAILED, reason=Reason.PROMPT_TOO_LONG)
    assert finished(sent) == {"a": Reason.PROMPT_TOO_LONG}
    driver.submit("b")
    assert finished(driver.end("b", outcome=LeaseOutcome.FAILED)) == {"b": Reason.INTERNAL}


@pytest.mark.parametrize(
    "outcome", [LeaseOutcome.RETURNED, LeaseOutcome.UNKNOWN, LeaseOutcome.REVOKED]
)
def test_given_back_goes_to_the_head_and_is_no_crash(outcome: LeaseOutcome) -> None:
    driver = Driver(max_attempts=1)
    driver.attach("e1")
    driver.attach("e2")
    driver.submit("a")
    driver.submit("b")
    driver.submit("c")
    driver.drain("e1")
    driver.end("a", "e1", outcome)
    assert driver.status("a").position == 0
    assert driver.status("c").position == 1
    assert granted(driver.end("b", "e2")) == [("a", "e2")]
    assert driver.core.current_lease("a") == ("e2", 1, 2)


def test_every_end_is_acknowledged_once_and_a_stale_one_changes_nothing() -> None:
    driver = Driver()
    driver.attach("e1")
    driver.attach("e2", models="B")
    driver.submit("a")
    for executor_id, request_id, epoch, attempt in (
        ("e1", "a", EPOCH - 1, 1),
        ("e1", "a", EPOCH, 2),
        ("e1", "nobody", EPOCH, 1),
        ("e2", "a", EPOCH, 1),
    ):
        sent = driver.end(request_id, executor_id, attempt=attempt, epoch=epoch)
        assert sent == [LeaseAcknowledged(executor_id, 1, request_id, epoch, attempt)]
    assert driver.core.current_lease("a") == ("e1", 1, 1)
    for _ in range(2):
        sent = driver.end("a")
        assert sent.count(LeaseAcknowledged("e1", 1, "a", EPOCH, 1)) == 1
    assert len(of_type(driver.sent, RequestFinished)) == 1


def test_events_of_an_old_session_are_dropped() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.attach(holds=(held("a"),))
    old = 1
    end = LeaseEnded("e1", old, "a", EPOCH, 2, LeaseOutcome.COMPLETED)
    assert driver.handle(end) == []
    assert driver.handle(ExecutorDisconnected("e1", old)) == []
    assert driver.core.current_lease("a") == ("e1", 2, 2)


def test_scenario_28_cancelled_while_queued_takes_no_slot() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.submit("b")
    assert finished(driver.cancel("b")) == {"b": Reason.CANCELLED}
    assert granted(driver.end("a")) == []
    assert driver.core.num_waiting == 0


def test_scenario_78_cancelled_while_running_frees_its_slot_when_the_executor_says_so() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.submit("b")
    sent = driver.cancel("a")
    assert finished(sent) == {"a": Reason.CANCELLED}
    assert of_type(sent, LeaseRevoked) == [LeaseRevoked("e1", 1, "a", EPOCH, 1)]
    assert driver.row().num_leased == 1
    assert driver.core.current_lease("a") is None
    sent = driver.end("a", outcome=LeaseOutcome.REVOKED)
    assert granted(sent) == [("b", "e1")]
    assert finished(sent) == {}


def test_a_completion_that_crosses_a_cancel_is_only_acknowledged() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.cancel("a")
    sent = driver.end("a", outcome=LeaseOutcome.COMPLETED)
    assert sent == [LeaseAcknowledged("e1", 1, "a", EPOCH, 1)]
    assert driver.row().num_free == 1


def test_cancelling_what_is_foreign_finished_or_unknown_does_nothing() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    assert driver.cancel("a", tenant="other") == []
    assert driver.cancel("nobody") == []
    driver.end("a")
    assert driver.cancel("a") == []


def test_scenario_73_the_queue_clock_does_not_run_while_executing() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a", queue_timeout_ms=1_000)
    assert driver.advance(2_000) == []
    assert finished(driver.end("a")) == {"a": None}


def test_scenario_73_a_waiter_is_evicted_at_its_deadline() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.submit("b", queue_timeout_ms=1_000)
    assert driver.core.next_deadline_ms() == driver.now_ms + 1_000
    assert driver.advance(999) == []
    [end] = driver.advance(1)
    assert isinstance(end, RequestFinished)
    assert (end.reason, end.queued_ms, end.total_ms) == (Reason.QUEUE_TIMEOUT, None, 1_000)
    assert end.retry_after_ms is not None


def test_the_queue_clock_stays_stopped_when_a_request_goes_back() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a", queue_timeout_ms=1_000, execution_timeout_ms=5_000)
    driver.drain()
    driver.end("a", outcome=LeaseOutcome.RETURNED)
    assert driver.advance(4_999) == []
    sent = driver.advance(1)
    assert finished(sent) == {"a": Reason.EXECUTION_TIMEOUT}
    assert driver.core.num_waiting == 0


def test_scenario_74_execution_timeout_cancels_on_the_executor() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a", execution_timeout_ms=1_000)
    driver.submit("b")
    sent = driver.advance(1_000)
    assert finished(sent) == {"a": Reason.EXECUTION_TIMEOUT}
    assert of_type(sent, LeaseRevoked) == [LeaseRevoked("e1", 1, "a", EPOCH, 1)]
    assert granted(driver.end("a", outcome=LeaseOutcome.REVOKED)) == [("b", "e1")]


def test_the_execution_clock_runs_over_all_attempts() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a", execution_timeout_ms=1_000)
    driver.advance(600)
    driver.end("a", outcome=LeaseOutcome.RETURNED)
    assert driver.attempts["a"] == 2
    assert finished(driver.advance(399)) == {}
    assert finished(driver.advance(1)) == {"a": Reason.EXECUTION_TIMEOUT}


@pytest.mark.parametrize("is_tick_first", [True, False])
def test_scenario_77_timeout_and_grant_in_one_millisecond_have_one_outcome(
    is_tick_first: bool,
) -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.submit("b", queue_timeout_ms=1_000)
    driver.now_ms += 1_000
    if is_tick_first:
        sent = driver.handle(Tick()) + driver.end("a")
        assert (finished(sent), granted(sent)) == ({"b": Reason.QUEUE_TIMEOUT, "a": None}, [])
        assert driver.row().num_free == 1
    else:
        sent = driver.end("a") + driver.handle(Tick())
        assert (finished(sent), granted(sent)) == ({"a": None}, [("b", "e1")])
        assert driver.row().num_free == 0


def test_a_late_tick_does_not_become_a_late_grant() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    driver.submit("b", queue_timeout_ms=1_000)
    driver.submit("c", queue_timeout_ms=5_000)
    driver.now_ms += 1_001
    sent = driver.end("a")
    assert finished(sent) == {"a": None, "b": Reason.QUEUE_TIMEOUT}
    assert granted(sent) == [("c", "e1")]


def test_a_late_tick_hears_a_completion_first() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a", execution_timeout_ms=1_000)
    driver.now_ms += 1_500
    assert finished(driver.end("a")) == {"a": None}
    assert driver.handle(Tick()) == []


def test_an_unconfirmed_revoke_cuts_the_session() -> None:
    driver = Driver(revoke_timeout_ms=500, executor_grace_ms=1_000)
    driver.attach(num_slots=2)
    driver.submit("a")
    driver.submit("b")
    driver.cancel("a")
    assert driver.advance(499) == []
    [closed] = driver.advance(1)
    assert isinstance(closed, SessionClosed)
    assert (closed.executor_id, closed.session) == ("e1", 1)
    row = driver.row()
    assert (row.state, row.num_leased, row.num_in_doubt) == ("lost", 0, 2)
    driver.advance(1_000)
    assert driver.core.num_waiting == 1
    assert driver.core.decisions["requeued.executor_lost"] == 1


def test_a_zero_queue_timeout_means_now_or_never() -> None:
    driver = Driver()
    driver.attach()
    assert granted(driver.submit("a", queue_timeout_ms=0)) == [("a", "e1")]
    driver.submit("b", queue_timeout_ms=0)
    assert finished(driver.advance(0)) == {"b": Reason.QUEUE_TIMEOUT}


@pytest.mark.parametrize("num_tokens", [0, 4])
@pytest.mark.parametrize("is_late", [False, True], ids=["cancelled", "timed out"])
def test_who_ends_before_its_lease_pays_for_what_was_generated(
    num_tokens: int, is_late: bool
) -> None:
    """Not for all that it might have generated, and not for ever."""
    driver = Driver()
    driver.attach()
    driver.submit("a", tenant="a", execution_timeout_ms=1_000)
    if is_late:
        driver.advance(1_000)
    else:
        driver.cancel("a", tenant="a")
    ended = LeaseEnded("e1", 1, "a", EPOCH, 1, LeaseOutcome.REVOKED, num_tokens)
    driver.handle(ended)
    fairness = driver.core._state.queue.fairness
    assert fairness.key((0, "A"), "a") == 10 + 2 * num_tokens


def test_what_a_lost_executor_did_for_an_ended_request_is_paid_by_nobody() -> None:
    driver = Driver(executor_grace_ms=1_000, max_attempts=1)
    driver.attach(num_slots=2)
    driver.submit("a", tenant="a")
    driver.submit("b", tenant="b")
    driver.cancel("a", tenant="a")
    driver.disconnect()
    assert finished(driver.advance(1_000)) == {"b": Reason.ATTEMPTS_EXHAUSTED}
    fairness = driver.core._state.queue.fairness
    assert fairness.key((0, "A"), "a") == fairness.key((0, "A"), "b") == 0
