"""The door: reasons, Retry-After, idempotency."""

from typing import Any

import pytest

from headway.errors import TABLE
from headway.reasons import Reason
from scheduler_svc.core.domain import RETRYABLE
from scheduler_svc.core.messages import (
    CloseDoor,
    RequestAdmitted,
    RequestDeduplicated,
)
from tests.core.scheduler.helpers import Driver, finished, granted, rejection, request


def test_the_retryable_reasons_are_those_of_the_error_table() -> None:
    assert {reason for reason, row in TABLE.items() if row.is_retryable} == RETRYABLE


def test_admitted_is_persisted_then_answered_then_granted() -> None:
    driver = Driver()
    driver.attach()
    sent = driver.submit("a")
    assert sent[0] == RequestAdmitted(request("a"))
    assert granted(sent) == [("a", "e1")]


def test_scenario_30_no_executor_ever_is_a_lack_of_capacity() -> None:
    refused = rejection(Driver(executor_grace_ms=10_000).submit("a"))
    assert refused.reason is Reason.NO_CAPACITY
    assert refused.retry_after_ms == 10_000


def test_scenario_30_a_model_that_nobody_offered_is_not_found() -> None:
    driver = Driver()
    driver.attach(models="A")
    refused = rejection(driver.submit("a", "B"))
    assert (refused.reason, refused.retry_after_ms) == (Reason.MODEL_NOT_FOUND, None)


def test_scenario_30_waiting_for_a_model_that_went_away_ends_with_the_queue_timeout() -> None:
    driver = Driver(executor_grace_ms=100)
    driver.attach()
    driver.submit("running")
    driver.submit("waiting", queue_timeout_ms=5_000)
    driver.disconnect()
    sent = driver.advance(5_000)
    assert finished(sent) == {"waiting": Reason.QUEUE_TIMEOUT}
    refused = rejection(driver.submit("late"))
    assert refused.reason is Reason.NO_CAPACITY


def test_a_lost_executor_is_expected_back_a_draining_one_is_not() -> None:
    driver = Driver()
    driver.attach()
    driver.disconnect()
    driver.submit("a")
    assert driver.core.num_waiting == 1
    driver.attach()
    driver.end("a")
    driver.drain()
    assert rejection(driver.submit("b")).reason is Reason.NO_CAPACITY


@pytest.mark.parametrize("band", [-1, 4])
def test_a_band_that_does_not_exist_is_invalid(band: int) -> None:
    driver = Driver(num_bands=4)
    driver.attach()
    refused = rejection(driver.submit("a", band=band))
    assert (refused.reason, refused.retry_after_ms) == (Reason.INVALID_REQUEST, None)


def test_closing_the_door_refuses_new_work_and_finishes_the_rest() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a", idempotency_key="k")
    driver.submit("b")
    driver.handle(CloseDoor())
    refused = rejection(driver.submit("c"))
    assert refused.reason is Reason.DRAINING
    assert refused.retry_after_ms is not None
    assert driver.submit("d", idempotency_key="k") == [RequestDeduplicated("d", "a")]
    assert granted(driver.end("a")) == [("b", "e1")]


def test_a_closed_door_says_when_the_next_scheduler_is_expected() -> None:
    driver = Driver(executor_grace_ms=5_000)
    driver.attach()
    driver.handle(CloseDoor())
    refused = rejection(driver.submit("a"))
    assert (refused.reason, refused.retry_after_ms) == (Reason.DRAINING, 5_000)


def test_scenario_71_max_inflight_counts_accepted_and_unfinished() -> None:
    driver = Driver(max_inflight=1)
    driver.attach(num_slots=8)
    driver.submit("a")
    assert rejection(driver.submit("b")).reason is Reason.QUEUE_FULL
    driver.end("a")
    assert granted(driver.submit("c")) == [("c", "e1")]


def test_inflight_bounds_of_a_model_and_of_a_tenant() -> None:
    driver = Driver(max_inflight_per_model=2, max_inflight_per_tenant=3)
    driver.attach(num_slots=8, models="AB")
    driver.submit("a")
    driver.submit("b")
    assert rejection(driver.submit("c")).reason is Reason.QUEUE_FULL
    driver.submit("d", "B")
    refused = rejection(driver.submit("e", "B"))
    assert refused.reason is Reason.QUOTA_EXCEEDED
    assert refused.retry_after_ms is not None
    assert granted(driver.submit("f", "B", tenant="other")) == [("f", "e1")]


def test_scenario_72_refused_requests_leave_no_trace() -> None:
    driver = Driver(max_queued_requests=1)
    driver.attach(num_slots=1)
    for name in "abcdef":
        driver.submit(name)
    assert driver.core.decisions["rejected.QUEUE_FULL"] == 4
    assert (driver.core.num_waiting, driver.core.num_running) == (1, 1)
    assert not driver.core.is_live("c")


def test_same_key_same_body_is_the_same_request_live_or_finished() -> None:
    driver = Driver(result_ttl_ms=1_000)
    driver.attach()
    driver.submit("a", idempotency_key="k", body_hash=b"1")
    again: dict[str, Any] = {"idempotency_key": "k", "body_hash": b"1"}
    assert driver.submit("b", **again) == [RequestDeduplicated("b", "a")]
    driver.end("a")
    driver.advance(999)
    assert driver.submit("c", **again) == [RequestDeduplicated("c", "a")]
    driver.advance(1)
    assert granted(driver.submit("d", **again)) == [("d", "e1")]


def test_a_key_whose_request_may_be_tried_again_is_free_for_it() -> None:
    """Its client is told to come back; under its key it must not find the old end for ever."""
    driver = Driver(result_ttl_ms=100_000)
    driver.attach(num_slots=1)
    driver.submit("hog")
    again: dict[str, Any] = {"idempotency_key": "k", "body_hash": b"1", "queue_timeout_ms": 10}
    driver.submit("a", **again)
    driver.advance(10)
    assert not driver.core.is_live("a")
    driver.end("hog")
    assert granted(driver.submit("b", **again)) == [("b", "e1")]
    assert driver.submit("c", **again) == [RequestDeduplicated("c", "b")]
    driver.end("b")
    driver.advance(99_999)
    assert driver.submit("d", **again) == [RequestDeduplicated("d", "b")]
    driver.advance(1)
    assert granted(driver.submit("e", **again)) == [("e", "e1")]


def test_same_key_other_body_is_a_conflict_other_tenant_is_not() -> None:
    driver = Driver()
    driver.attach(num_slots=2)
    driver.submit("a", idempotency_key="k", body_hash=b"1")
    refused = rejection(driver.submit("b", idempotency_key="k", body_hash=b"2"))
    assert (refused.reason, refused.retry_after_ms) == (Reason.REQUEST_ID_CONFLICT, None)
    sent = driver.submit("c", tenant="other", idempotency_key="k", body_hash=b"2")
    assert granted(sent) == [("c", "e1")]


def test_an_id_that_is_live_is_a_conflict() -> None:
    driver = Driver()
    driver.attach()
    driver.submit("a")
    assert rejection(driver.submit("a")).reason is Reason.REQUEST_ID_CONFLICT
    assert driver.core.is_live("a")


def test_keys_of_finished_requests_are_bounded() -> None:
    driver = Driver(max_finished_keys=2)
    driver.attach()
    for name in "abc":
        driver.submit(name, idempotency_key=name)
        driver.end(name)
    assert driver.submit("d", idempotency_key="c") == [RequestDeduplicated("d", "c")]
    assert granted(driver.submit("e", idempotency_key="a")) == [("e", "e1")]


def test_executors_are_bounded() -> None:
    driver = Driver(max_executors=1)
    driver.attach("e1")
    assert driver.core.decisions["attached"] == 1
    driver.attach("e2")
    assert driver.core.decisions["session_closed.fleet_full"] == 1


def test_models_that_are_away_are_forgotten_oldest_first() -> None:
    driver = Driver(max_known_models=2, executor_grace_ms=10)
    for model in "ABC":
        driver.attach(models=model)
    assert rejection(driver.submit("a", "A")).reason is Reason.MODEL_NOT_FOUND
    assert rejection(driver.submit("b", "B")).reason is Reason.NO_CAPACITY
    assert granted(driver.submit("c", "C")) == [("c", "e1")]


def test_a_model_that_is_offered_or_waited_for_is_not_forgotten() -> None:
    """However long ago its executor attached, and however many others came and went since."""
    driver = Driver(max_known_models=2, executor_grace_ms=10)
    driver.attach("e0", models="A")
    driver.attach("e1", models="B")
    driver.submit("b1", "B")
    driver.submit("b2", "B")
    for model in "CDEF":
        driver.attach("e1", models=model)
    assert granted(driver.submit("a", "A")) == [("a", "e0")]
    assert driver.status("b2").position == 1
    driver.attach("e1", models="B")
    assert driver.core.num_waiting == 1
    assert driver.core.num_running == 2
    state = driver.core._state
    assert list(state.known_models) == ["A", "B"]
    assert state.totals.models.keys() == state.known_models.keys()


def backlog(models: str = "A") -> Driver:
    """A slot that gives one grant in 1,000 ms, measured, and 30 requests of tenant t waiting."""
    driver = Driver(retry_after_max_ms=120_000)
    driver.attach(models=models)
    forever: dict[str, Any] = {"queue_timeout_ms": 10**8, "execution_timeout_ms": 10**8}
    for number in range(40):
        driver.submit(f"r{number}", **forever)
    for number in range(9):
        driver.advance(1_000)
        driver.end(f"r{number}")
    assert driver.core.num_waiting == 30
    return driver


def test_a_start_beyond_the_deadline_is_refused_now_with_an_honest_retry_after() -> None:
    driver = backlog()
    refused = rejection(driver.submit("late", queue_timeout_ms=14_000))
    assert refused.reason is Reason.DEADLINE_UNREACHABLE
    assert refused.retry_after_ms is not None
    assert abs(refused.retry_after_ms - 31_000) < 1_000


def test_the_refusal_allows_for_twice_the_measured_rate() -> None:
    driver = backlog()
    assert driver.submit("hopeful", queue_timeout_ms=16_500)
    assert driver.core.is_live("hopeful")


def test_the_backlog_of_one_tenant_closes_the_door_to_nobody_else() -> None:
    driver = backlog()
    driver.submit("other", tenant="other", queue_timeout_ms=14_000)
    assert driver.core.is_live("other")


def test_the_first_of_a_model_stands_behind_the_backlog_of_those_that_share_its_home() -> None:
    driver = backlog("AB")
    refused = rejection(driver.submit("late", "B", queue_timeout_ms=14_000))
    assert refused.reason is Reason.DEADLINE_UNREACHABLE
    driver.submit("patient", "B", queue_timeout_ms=16_500)
    assert driver.status("patient").position == 30


def test_what_was_never_measured_refuses_nobody() -> None:
    driver = Driver()
    driver.attach()
    for number in range(50):
        driver.submit(f"r{number}", queue_timeout_ms=1)
    assert driver.core.num_waiting == 49


def test_a_lull_does_not_close_the_door() -> None:
    """One grant a second was measured of one slot; four slots are there now."""
    driver = backlog()
    driver.resize("e1", 4)
    driver.submit("hopeful", queue_timeout_ms=4_000)
    assert driver.core.is_live("hopeful"), "28 grants before it, four a second, twice as good"
    assert rejection(driver.submit("late", queue_timeout_ms=3_000)).reason is (
        Reason.DEADLINE_UNREACHABLE
    )
