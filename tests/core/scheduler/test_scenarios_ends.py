"""Scenarios 59-62, 71-74, 77, 78: every way out gives the slot back, once; the door; the clocks."""

import pytest

from headway.errors import TABLE
from headway.reasons import Reason
from scheduler_svc.core.messages import LeaseOutcome, LeaseRevoked, Tick
from tests.core.scheduler.helpers import finished, granted, of_type, rejection
from tests.core.scheduler.test_scenarios import World


def busy(num_slots: int = 1, **settings: int) -> tuple[World, str, str]:
    """b1 is full; one request runs (or more), one waits."""
    world = World(**settings)
    world.backend("b1", num_slots, "A", resident="A")
    running = world.run("A" * num_slots, "b1")
    [waiting] = world.ask("A")
    return world, running[0], waiting


@pytest.mark.parametrize("way", ["finished", "client drops", "upstream resets"])
def test_scenario_59_every_end_of_a_stream_counts_once_and_wakes_the_next(way: str) -> None:
    world, running, waiting = busy()
    world.start(running, "b1")
    world.advance(100)
    outcome = LeaseOutcome.COMPLETED
    if way == "client drops":
        assert of_type(world.cancel(running), LeaseRevoked)
        outcome = LeaseOutcome.REVOKED
    elif way == "upstream resets":
        outcome = LeaseOutcome.FAILED
    assert granted(world.end(running, "b1", outcome)) == [(waiting, "b1")]
    row = world.row("b1")
    assert (row.num_free, row.num_leased) == (0, 1)
    assert row.stats is not None
    assert row.stats.mean_duration_ms == (100 if way == "finished" else None)
    assert granted(world.end(running, "b1", outcome)) == []
    assert world.row("b1") == row


def test_scenario_60_a_failure_that_is_told_twice_releases_once() -> None:
    world, running, waiting = busy(num_slots=2)
    world.end(running, "b1", LeaseOutcome.FAILED, reason=Reason.INTERNAL)
    assert world.place(waiting) == "b1"
    world.end(running, "b1", LeaseOutcome.FAILED, reason=Reason.INTERNAL)
    assert (world.row("b1").num_free, world.row("b1").num_leased) == (0, 2)
    assert finished(world.sent) == {running: Reason.INTERNAL}


def test_scenario_61_failover_takes_a_slot_of_its_own() -> None:
    world = World(executor_grace_ms=100)
    world.backend("b1", 1, "A", resident="A")
    [name] = world.run("A", "b1")
    world.backend("b2", 1, "A", resident="A")
    world.disconnect("b1")
    world.advance(101)
    assert world.place(name) == "b2"
    assert [row.executor_id for row in world.core.snapshot(world.now_ms, 0).executors] == ["b2"]
    assert world.row("b2").num_leased == 1
    [other] = world.ask("A", execution_timeout_ms=5_000, queue_timeout_ms=5_000)
    world.disconnect("b2")
    world.advance(5_000)
    assert TABLE[Reason.QUEUE_TIMEOUT].http_status == 503
    assert finished(world.sent)[other] is Reason.QUEUE_TIMEOUT


def test_scenario_62_failures_are_no_hits_and_do_not_shorten_the_mean() -> None:
    world = World()
    world.backend("b1", 1, "A", resident="A")
    [good] = world.ask("A", session_id="s")
    world.advance(1_000)
    world.done(good)
    [bad] = world.ask("A", session_id="s")
    world.end(bad, "b1", LeaseOutcome.FAILED, reason=Reason.INTERNAL)
    stats = world.row("b1").stats
    assert stats is not None
    assert stats.mean_duration_ms == 1_000
    assert stats.affinity is None


def test_scenario_71_max_inflight_counts_what_is_accepted_and_not_ended() -> None:
    world = World(max_inflight=1)
    world.backend("b1", 4, "A", resident="A")
    [first] = world.run("A", "b1")
    refused = rejection(world.submit("second"))
    assert refused.reason is Reason.QUEUE_FULL
    assert TABLE[refused.reason].http_status == 429
    assert not world.core.is_live("second")
    world.done(first)
    world.run("A", "b1")


def test_scenario_72_what_is_refused_counts_in_no_total() -> None:
    """The time that a refusal takes is on the gateway's answer; here it is one event."""
    world = World(max_queued_tokens=100)
    world.backend("b1", 1, "A", resident="A")
    world.run("A", "b1")
    world.ask("A", num_prompt_tokens=40, max_tokens=10)
    for number in range(5):
        sent = world.submit(f"large{number}", num_prompt_tokens=90, max_tokens=10)
        assert rejection(sent).reason is Reason.QUEUE_FULL
    world.ask("A", num_prompt_tokens=40, max_tokens=10)  # there is still room for 50 tokens
    assert world.core.num_waiting == 2
    assert world.core.decisions["admitted"] == 3
    assert world.core.decisions["rejected.QUEUE_FULL"] == 5


def test_scenario_73_the_queue_clock_stops_with_the_grant_and_rings_on_time() -> None:
    world = World()
    world.backend("b1", 1, "A", resident="A")
    [name] = world.ask("A", queue_timeout_ms=1_000)
    [waiting] = world.ask("A", queue_timeout_ms=1_000)
    world.advance(999)
    assert world.core.is_live(waiting)
    assert finished(world.advance(1)) == {waiting: Reason.QUEUE_TIMEOUT}
    world.advance(1_000)
    assert finished(world.done(name)) == {name: None}


def test_scenario_74_the_execution_clock_cancels_on_the_executor() -> None:
    world = World()
    world.backend("b1", 1, "A", resident="A")
    [name] = world.ask("A", execution_timeout_ms=1_000)
    sent = world.advance(2_000)
    assert finished(sent) == {name: Reason.EXECUTION_TIMEOUT}
    assert len(of_type(sent, LeaseRevoked)) == 1
    assert TABLE[Reason.EXECUTION_TIMEOUT].http_status != TABLE[Reason.QUEUE_TIMEOUT].http_status
    world.end(name, "b1", LeaseOutcome.REVOKED)
    assert world.row("b1").num_free == 1


@pytest.mark.parametrize("is_tick_first", [True, False])
def test_scenario_77_grant_and_timeout_in_one_tick_have_one_outcome(is_tick_first: bool) -> None:
    world = World()
    world.backend("b1", 1, "A", resident="A")
    [running] = world.run("A", "b1")
    [waiting] = world.ask("A", queue_timeout_ms=1_000)
    world.now_ms += 1_000
    if is_tick_first:
        assert finished(world.handle(Tick())) == {waiting: Reason.QUEUE_TIMEOUT}
        assert granted(world.done(running)) == []
    else:
        assert granted(world.done(running)) == [(waiting, "b1")]
        assert finished(world.handle(Tick())) == {}
        world.done(waiting)
    assert list(finished(world.sent)).count(waiting) == 1
    assert (world.row("b1").num_free, world.row("b1").num_leased) == (1, 0)


@pytest.mark.parametrize("when", ["queued", "granted", "first token"])
def test_scenario_78_a_client_that_hangs_up_frees_its_slot_at_once(when: str) -> None:
    world, running, waiting = busy()
    if when == "queued":
        assert finished(world.cancel(waiting)) == {waiting: Reason.CANCELLED}
        assert granted(world.done(running)) == []
    else:
        if when == "first token":
            world.start(running, "b1")
        sent = world.cancel(running)
        assert finished(sent) == {running: Reason.CANCELLED}
        assert len(of_type(sent, LeaseRevoked)) == 1
        assert granted(world.end(running, "b1", LeaseOutcome.REVOKED)) == [(waiting, "b1")]
        world.done(waiting)
    assert world.row("b1").num_free == 1
