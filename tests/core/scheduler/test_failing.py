"""Models that no executor can load: who is told what, and how often it is tried again."""

from headway.reasons import Reason
from scheduler_svc.core.messages import (
    Action,
    ModelChanged,
    ModelState,
    RequestFinished,
    Submit,
    Tick,
)
from tests.core.scheduler.helpers import finished, granted, of_type, rejection, request
from tests.core.scheduler.test_residency import Loading, orders

WORDS = "the file is cut short"
TEXT = f"No executor can load the model 'A': {WORDS}"


class Broken(Loading):
    """Executors whose loads fail with these words."""

    def __init__(self, **settings: int) -> None:
        super().__init__(
            load_backoff_ms=100, load_backoff_max_ms=400, max_load_failures=2, **settings
        )

    def failed(self, name: str, model: str) -> list[Action]:
        change = ModelChanged(name, self.sessions[name], model, ModelState.FAILED, message=WORDS)
        return self.handle(change)

    def fail_twice(self, *names: str) -> list[Action]:
        """Each of these is ordered to load A, and cannot."""
        sent: list[Action] = []
        for _ in range(2):
            for name in names:
                assert self.row(name).loading_model == "A"
                sent += self.failed(name, "A")
            if self.core.num_waiting:
                sent += self.advance(101)
        return sent


def test_who_waits_is_told_the_cause_when_every_executor_has_failed() -> None:
    world = Broken()
    world.backend("b1", 1, "A")
    world.backend("b2", 1, "A")
    world.submit("a1", "A", queue_timeout_ms=60_000)
    world.submit("a2", "A", band=1, queue_timeout_ms=60_000)
    ends = of_type(world.fail_twice("b1", "b2"), RequestFinished)
    told = [
        (end.request_id, end.reason, end.message, end.retry_after_ms)
        for end in ends
        if isinstance(end, RequestFinished)
    ]
    assert told == [("a1", Reason.NO_CAPACITY, TEXT, 1_000), ("a2", *told[0][1:])]
    assert world.core.decisions["load.given_up"] == 1


def test_who_comes_is_refused_until_the_pause_is_over() -> None:
    world = Broken(retry_after_min_ms=1)
    world.backend("b1", 1, "A")
    world.submit("a1")
    world.fail_twice("b1")
    world.advance(50)
    refused = rejection(world.submit("a2"))
    assert (refused.reason, refused.message) == (Reason.NO_CAPACITY, TEXT)
    assert refused.retry_after_ms == 150  # of 200
    world.advance(150)
    assert orders(world.submit("a3")) == [("b1", "A", ())]
    assert granted(world.submit("a4")) == []
    assert set(finished(world.failed("b1", "A"))) == {"a3", "a4"}
    assert rejection(world.submit("a5")).retry_after_ms == 400


def test_nobody_asks_and_nothing_is_tried() -> None:
    world = Broken()
    world.backend("b1", 1, "A")
    world.submit("a")
    world.fail_twice("b1")
    assert orders(world.advance(60_000)) == []


def test_one_load_that_works_ends_it() -> None:
    world = Broken()
    world.backend("b1", 1, "A")
    world.submit("a1")
    world.fail_twice("b1")
    world.advance(200)
    world.submit("a2")
    assert granted(world.loaded("b1", "A")) == [("a2", "b1")]
    world.end("a2", "b1")
    assert granted(world.submit("a3")) == [("a3", "b1")]
    assert not world.core.snapshot(world.now_ms, 0).models[0].failure


def test_other_models_go_on_meanwhile() -> None:
    world = Broken()
    world.backend("b1", 2, "AB", resident="B")
    world.submit("a")
    world.submit("b", "B")
    assert set(finished(world.fail_twice("b1"))) == {"a"}
    assert granted(world.submit("b2", "B")) == [("b2", "b1")]


def test_an_executor_that_was_not_tried_is_waited_for() -> None:
    world = Broken()
    world.backend("b1", 1, "A")
    world.backend("b2", 1, "AB", max_models=1, resident="B")
    [running] = world.run("B", "b2")
    world.submit("a")
    assert finished(world.fail_twice("b1")) == {}
    assert orders(world.done(running)) == [("b2", "A", ("B",))]
    assert granted(world.loaded("b2", "A")) == [("a", "b2")]


def test_the_last_hope_may_drain_or_go() -> None:
    for leave in (Broken.drain, Broken.disconnect):
        world = Broken(executor_grace_ms=0)
        world.backend("b1", 1, "A")
        world.submit("a")
        world.backend("b2", 1, "AB", max_models=1, resident="B")
        world.run("B", "b2")
        world.failed("b1", "A")
        world.advance(101)
        assert finished(world.failed("b1", "A")) == {}
        sent = leave(world, "b2")
        world.now_ms += 1
        assert set(finished(sent + world.handle(Tick()))) == {"a"}


def test_an_executor_that_comes_is_a_new_hope() -> None:
    world = Broken()
    world.backend("b1", 1, "A")
    world.submit("a1")
    world.fail_twice("b1")
    world.backend("b2", 1, "A")
    assert orders(world.submit("a2")) == [("b2", "A", ())]
    world.disconnect("b1")
    assert finished(world.advance(1_001)) == {}  # b2 is at it
    assert granted(world.loaded("b2", "A")) == [("a2", "b2")]


def test_a_new_process_starts_without_the_failures_of_the_old_one() -> None:
    world = Broken()
    world.backend("b1", 1, "A")
    world.submit("a1")
    world.fail_twice("b1")
    world.backend("b1", 1, "A", incarnation="i2")
    assert orders(world.submit("a2")) == [("b1", "A", ())]


def test_a_load_that_kills_executors_is_held_against_the_model() -> None:
    """Each comes back under a new name, as by default, and is what nobody has failed on."""
    world = Broken(executor_grace_ms=10)
    world.backend("b0", 1, "A")
    assert orders(world.submit("a1")) == [("b0", "A", ())]
    world.disconnect("b0")
    assert orders(world.backend("b1", 1, "A")) == []  # it is not known yet
    assert orders(world.advance(100)) == []  # it is known, and the pause lasts
    assert orders(world.advance(11)) == [("b1", "A", ())]
    world.backend("b2", 1, "A")
    world.disconnect("b1")
    assert set(finished(world.advance(11))) == {"a1"}
    refused = rejection(world.submit("a2"))
    assert refused.message.endswith("The executor was lost while it loaded the model.")
    world.advance(200)
    assert orders(world.submit("a3")) == [("b2", "A", ())]


def test_a_stream_that_breaks_or_a_shutdown_is_no_death_of_a_load() -> None:
    world = Broken(executor_grace_ms=10)
    world.backend("b1", 1, "A")
    world.submit("a")
    world.disconnect("b1")
    world.backend("b1", 1, "A")
    assert world.row("b1").loading_model == "A"
    world.resize("b1", 0)
    world.disconnect("b1")
    world.advance(11)
    assert "load.died" not in world.core.decisions


def test_many_are_told_little_by_little() -> None:
    world = Broken()
    world.backend("b1", 1, "A")
    for number in range(600):
        world.core.handle(Submit(request(f"a{number}")), world.now_ms)
    world.failed("b1", "A")
    world.advance(101)
    first = world.failed("b1", "A")
    assert 0 < len(finished(first)) < 600
    assert len(finished(first + world.advance(5))) == 600


def test_the_snapshot_shows_it() -> None:
    world = Broken()
    world.backend("b1", 1, "A")
    world.backend("b2", 1, "AB", max_models=1, resident="B")
    world.run("B", "b2")
    world.submit("a")
    world.failed("b1", "A")
    [row, _] = world.core.snapshot(world.now_ms, 0).models
    assert row.failure is not None
    assert (row.failure.message, row.failure.num_executors) == (WORDS, 1)
    assert row.failure.refused_ms == 0
    world.advance(101)
    world.failed("b1", "A")
    world.drain("b2")
    world.advance(50)
    [row, _] = world.core.snapshot(world.now_ms, 0).models
    assert row.failure is not None
    assert (row.failure.num_executors, row.failure.refused_ms) == (1, 150)


def test_the_door_opens_again_with_the_shortest_pause() -> None:
    world = Broken(retry_after_min_ms=1)
    world.backend("b1", 1, "A")
    world.backend("b2", 1, "A")
    world.submit("a1")
    world.failed("b1", "A")
    world.failed("b2", "A")
    assert orders(world.advance(101)) == [("b1", "A", ())]
    assert orders(world.failed("b1", "A")) == [("b2", "A", ())]
    world.advance(50)
    assert set(finished(world.failed("b2", "A"))) == {"a1"}
    assert rejection(world.submit("a2")).retry_after_ms == 150  # of b1's, 200 of b2's


def test_executors_that_die_together_are_one_death() -> None:
    """Of the machine they were on, say."""
    world = Broken(executor_grace_ms=10)
    for name in ("b1", "b2"):
        world.backend(name, 1, "A")
    sent = world.submit("a1") + world.submit("a2")
    assert orders(sent) == [("b1", "A", ()), ("b2", "A", ())]
    world.disconnect("b1")
    world.disconnect("b2")
    assert finished(world.advance(11)) == {}
    assert world.core.decisions["load.died"] == 2


def test_a_model_that_some_executor_has_is_refused_to_nobody() -> None:
    world = Broken(executor_grace_ms=10)
    world.backend("b1", 1, "A", resident="A")
    [running] = world.run("A", "b1")
    world.backend("b2", 1, "A")
    assert orders(world.submit("a")) == [("b2", "A", ())]
    world.disconnect("b2")
    world.advance(11)
    world.backend("b3", 1, "A")
    assert orders(world.advance(101)) == [("b3", "A", ())]
    world.disconnect("b3")
    assert finished(world.advance(11)) == {}
    assert world.core.decisions["load.died"] == 2
    assert granted(world.done(running)) == [("a", "b1")]


def test_nobody_is_told_while_one_executor_still_tries() -> None:
    """Two died of the load, one after the other; a third is at it all the while."""
    world = Broken(executor_grace_ms=10)
    for name in ("b1", "b2", "b3"):
        world.backend(name, 1, "A")
    sent = world.submit("a1") + world.submit("a2") + world.submit("a3")
    assert orders(sent) == [("b1", "A", ()), ("b2", "A", ()), ("b3", "A", ())]
    for name in ("b1", "b2"):
        world.disconnect(name)
        assert finished(world.advance(111)) == {}
    assert world.core.decisions["load.died"] == 2
    assert granted(world.loaded("b3", "A")) == [("a1", "b3")]
