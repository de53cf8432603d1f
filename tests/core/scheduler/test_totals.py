"""What was served of each model, and how much of a wait was the wait for the model itself."""

from scheduler_svc.core.answers import SessionTotals
from scheduler_svc.core.messages import RequestFinished
from scheduler_svc.core.totals import Totals
from tests.core.scheduler.helpers import Driver, of_type


def test_times_of_being_nowhere_add_up() -> None:
    totals = Totals()
    totals.moved("m", False, 10)
    totals.moved("m", False, 20)  # said twice
    assert totals.nowhere_ms("m", 30) == 20
    totals.moved("m", True, 40)
    totals.moved("m", True, 45)
    assert totals.nowhere_ms("m", 100) == 30
    totals.moved("m", False, 100)
    assert totals.nowhere_ms("m", 105) == 35


def test_the_wait_for_the_model_is_a_part_of_the_wait() -> None:
    """Ten milliseconds behind another, then fifty without a home, then ten until it is granted."""
    driver = Driver()
    driver.attach(num_slots=1)
    driver.submit("first")
    driver.submit("a")
    driver.advance(10)
    driver.drain()
    driver.advance(50)
    driver.undrain()
    driver.advance(10)
    driver.end("first")
    (end,) = of_type(driver.end("a"), RequestFinished)
    assert isinstance(end, RequestFinished)
    assert (end.queued_ms, end.model_wait_ms) == (70, 50)


def test_who_never_waited_for_the_model_says_so() -> None:
    driver = Driver()
    driver.attach(num_slots=1)
    driver.advance(1_000)
    driver.submit("a")
    (end,) = of_type(driver.end("a"), RequestFinished)
    assert isinstance(end, RequestFinished)
    assert end.model_wait_ms == 0


def test_who_was_never_granted_says_nothing() -> None:
    driver = Driver()
    driver.attach(num_slots=0)
    driver.submit("a")
    (end,) = of_type(driver.cancel("a"), RequestFinished)
    assert isinstance(end, RequestFinished)
    assert end.model_wait_ms is None


def test_operators_see_models_and_sessions() -> None:
    driver = Driver()
    driver.attach("e1", num_slots=1)
    driver.submit("a", session_id="s", num_prompt_tokens=5, max_tokens=7)
    driver.submit("b", num_prompt_tokens=5, max_tokens=7)
    (row,) = driver.core.snapshot(driver.now_ms, 10).models
    assert (row.model, row.num_requests, row.num_tokens) == ("A", 1, 12)
    assert (row.num_waiting, row.num_running, row.num_homes) == (1, 1, 1)
    driver.end("a")
    driver.end("b")
    driver.submit("c", session_id="s")
    driver.end("c")
    snapshot = driver.core.snapshot(driver.now_ms, 10)
    (row,) = snapshot.models
    assert (row.num_requests, row.num_waiting, row.num_running, row.num_sessions) == (3, 0, 0, 1)
    assert snapshot.sessions == SessionTotals(num_tracked=1, num_hits=1, num_misses=0)


def test_a_row_of_the_queue_has_its_tokens() -> None:
    driver = Driver()
    driver.attach(num_slots=0)
    driver.submit("a", num_prompt_tokens=5, max_tokens=7, num_samples=2)
    (row,) = driver.core.snapshot(driver.now_ms, 10).queue
    assert row.num_tokens == 19
