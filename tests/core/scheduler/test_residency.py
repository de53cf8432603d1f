"""Models on executors: what is loaded where, what has to leave, what failure and holds do."""

from scheduler_svc.core.messages import (
    Action,
    ModelChanged,
    ModelLoadOrdered,
    ModelState,
    SessionClosed,
)
from tests.core.scheduler.helpers import Driver, granted, of_type
from tests.core.scheduler.test_scenarios import World


class Loading(World):
    """Executors that answer an ordered load only when the test says so."""

    def handle(self, event) -> list[Action]:  # type: ignore[no-untyped-def]
        return Driver.handle(self, event)

    def loaded(self, name: str, model: str, load_ms: int | None = None) -> list[Action]:
        session = self.sessions[name]
        return self.handle(ModelChanged(name, session, model, ModelState.RESIDENT, load_ms))

    def failed(self, name: str, model: str) -> list[Action]:
        return self.handle(ModelChanged(name, self.sessions[name], model, ModelState.FAILED))


def orders(sent: list[Action]) -> list[tuple[str, str, tuple[str, ...]]]:
    found = []
    for load in of_type(sent, ModelLoadOrdered):
        assert isinstance(load, ModelLoadOrdered)
        found.append((load.executor_id, load.model, load.evict))
    return found


def test_nothing_is_granted_before_the_model_is_there() -> None:
    world = Loading()
    world.backend("b1", 2, "AB")
    sent = world.submit("a", "A")
    assert (orders(sent), granted(sent)) == ([("b1", "A", ())], [])
    assert world.row("b1").loading_model == "A"
    assert granted(world.loaded("b1", "A", 70)) == [("a", "b1")]
    assert world.row("b1").resident_models == ("A",)
    assert world.row("b1").reservation is None


def test_a_running_lease_is_never_loaded_over() -> None:
    world = Loading(equalization_ms=1_000)
    world.backend("b1", 2, "AB", max_models=1, resident="A")
    world.run("A", "b1")
    assert orders(world.submit("b", "B")) == []
    assert orders(world.advance(5_000)) == []
    assert world.reservation("b1") == "B"
    assert orders(world.done("A1")) == [("b1", "B", ("A",))]


def test_one_load_at_a_time_and_first_places_first() -> None:
    world = Loading()
    world.backend("b1", 3, "ABC")
    assert orders(world.submit("a", "A")) == [("b1", "A", ())]
    assert orders(world.submit("b", "B")) == []
    sent = world.loaded("b1", "A")
    assert (granted(sent), orders(sent)) == ([("a", "b1")], [("b1", "B", ())])


def test_seats_are_kept_for_the_model_that_is_loading() -> None:
    world = Loading()
    world.backend("b1", 2, "AB", resident="A")
    world.submit("b", "B")
    sent = world.submit("a1", "A") + world.submit("a2", "A")
    assert granted(sent) == [("a1", "b1")]
    row = world.row("b1").reservation
    assert row is not None
    assert (row.model, row.reason) == ("B", "load")
    assert granted(world.loaded("b1", "B")) == [("b", "b1")]


def test_in_fifo_order_no_seat_is_kept() -> None:
    world = Loading(bonus=0)
    world.backend("b1", 1, "AB", resident="A")
    world.submit("b", "B")
    assert granted(world.submit("a", "A")) == [("a", "b1")]
    assert granted(world.loaded("b1", "B")) == []


def test_a_failed_load_backs_off_there_and_goes_elsewhere() -> None:
    world = Loading(load_backoff_ms=100, load_backoff_max_ms=250, max_load_failures=9)
    world.backend("b1", 1, "A")
    world.backend("b2", 1, "A")
    assert orders(world.submit("a", "A")) == [("b1", "A", ())]
    assert orders(world.failed("b1", "A")) == [("b2", "A", ())]
    assert orders(world.failed("b2", "A")) == []
    assert orders(world.advance(99)) == []
    assert orders(world.advance(2)) == [("b1", "A", ())]
    assert orders(world.failed("b1", "A")) == [("b2", "A", ())]
    world.failed("b2", "A")
    assert orders(world.advance(190)) == []
    assert orders(world.advance(20)) == [("b1", "A", ())]
    assert orders(world.failed("b1", "A")) == [("b2", "A", ())]
    world.failed("b2", "A")
    assert orders(world.advance(240)) == []
    assert orders(world.advance(20)) == [("b1", "A", ())], "at most 250, not 400"
    assert granted(world.loaded("b1", "A")) == [("a", "b1")]


def test_a_load_without_an_answer_costs_the_session() -> None:
    world = Loading(load_timeout_ms=500)
    world.backend("b1", 1, "A")
    world.submit("a", "A")
    assert of_type(world.advance(501), SessionClosed)
    assert world.row("b1").state == "lost"


def test_a_cheap_switch_does_not_shorten_the_dwell_after_a_dear_one() -> None:
    """W6: 10 s of load at a share of 0.1 are 100 s of dwell, also if the model goes meanwhile
    because nobody asks for it, and is wanted again."""
    world = Loading(equalization_ms=1_000, hold_ms=60_000, switch_time_share=0.1)
    world.backend("b1", 1, "AB", max_models=1, resident="B")
    world.done(*world.run("B", "b1"))
    assert orders(world.submit("a", "A")) == [("b1", "A", ("B",))]
    world.loaded("b1", "A", 10_000)
    until_ms = world.now_ms + 100_000
    world.end("a", "b1")
    assert orders(world.submit("b", "B")) == [("b1", "B", ("A",))]
    world.loaded("b1", "B", 100)
    world.submit("a again", "A", queue_timeout_ms=600_000)
    world.submit("b again", "B", queue_timeout_ms=600_000)
    world.submit("b once more", "B", queue_timeout_ms=600_000)
    world.advance(30_000)
    world.end("b", "b1")
    sent = world.advance(until_ms - world.now_ms - 1)
    assert orders(sent) == []
    assert world.reservation("b1") is None
    world.advance(1)
    assert world.reservation("b1") == "A"


def test_a_switch_that_fails_dwells_as_long_as_it_was_expected_to() -> None:
    """Else two models could push each other out as often as loads fail."""
    world = Loading(equalization_ms=1_000, load_ms=500, switch_time_share=0.1)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    running = world.run("A", "b1")
    world.submit("b", "B")
    world.submit("a", "A")
    world.advance(1_000)
    assert world.reservation("b1") == "B"
    assert orders(world.done(*running)) == [("b1", "B", ("A",))]
    executor = world.core._state.fleet.executors["b1"]
    world.advance(300)
    assert orders(world.failed("b1", "B"))[0][1] == "A"
    assert executor.next_switch_ms == world.now_ms + 5_000


def test_a_load_on_an_executor_that_ceases_to_serve_is_no_place() -> None:
    world = Loading()
    world.backend("b1", 1, "A")
    assert orders(world.submit("a", "A")) == [("b1", "A", ())]
    world.backend("b2", 1, "A")
    assert orders(world.drain("b1")) == [("b2", "A", ())]


def test_a_load_that_works_ends_the_backoff() -> None:
    world = Loading(load_backoff_ms=100, hold_ms=0)
    world.backend("b1", 1, "AB", max_models=1)
    world.submit("a", "A")
    world.failed("b1", "A")
    assert orders(world.advance(101)) == [("b1", "A", ())]
    world.loaded("b1", "A")
    world.end("a", "b1")
    world.submit("b", "B")
    world.loaded("b1", "B")
    world.end("b", "b1")
    world.submit("a2", "A")
    world.failed("b1", "A")
    assert orders(world.advance(101)) == [("b1", "A", ())], "100 ms again, and not 200"


def test_a_cache_is_forgotten_with_the_model_that_leaves() -> None:
    world = Loading(hold_ms=0)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    [a] = world.ask("A", prefix_hashes=(1, 2))
    prefixes = world.core._state.prefixes
    assert prefixes.longest((1, 2)) == {"b1": 2}
    world.done(a)
    assert orders(world.submit("b", "B")) == [("b1", "B", ("A",))]
    assert prefixes.longest((1, 2)) == {}


def test_a_lease_that_vanishes_with_its_model_makes_room_below_the_limit() -> None:
    world = World(model_limits={"A": 1})
    world.backend("b1", 1, resident="A")
    [first] = world.run("A", "b1")
    world.backend("b2", 1, "A", resident="A")
    [second] = world.ask("A")
    world.cancel(first)
    world.disconnect("b1")
    assert world.place(second) is None, "b1 did not say yet that it stopped"
    assert granted(world.attach("b1", 1, "B")) == [(second, "b2")]


def test_a_load_that_goes_on_through_a_broken_session_keeps_its_place() -> None:
    """Nobody wants A any more, and yet it comes: an order for B would be refused until then."""
    world = Loading(hold_ms=0)
    world.backend("b1", 1, "AB", max_models=1)
    world.submit("a", "A")
    world.cancel("a")
    world.disconnect("b1")
    assert orders(world.backend("b1", 1, "AB", max_models=1, loading="A")) == []
    assert world.row("b1").loading_model == "A"
    assert orders(world.submit("b", "B")) == []
    assert orders(world.loaded("b1", "A")) == [("b1", "B", ("A",))]


def test_who_waits_for_a_load_that_an_earlier_scheduler_ordered_is_granted_when_it_is_done() -> (
    None
):
    world = Loading()
    world.backend("b1", 1, "AB", max_models=1, loading="A")
    assert orders(world.submit("a", "A")) == []
    assert granted(world.loaded("b1", "A")) == [("a", "b1")]


def test_a_load_that_fails_after_its_session_broke_is_a_failure() -> None:
    world = Loading(load_backoff_ms=100)
    world.backend("b1", 1, "A", max_models=1)
    world.submit("a", "A")
    world.disconnect("b1")
    world.backend("b1", 1, "A", max_models=1, loading="A")
    assert orders(world.failed("b1", "A")) == []
    assert orders(world.advance(101)) == [("b1", "A", ())]


def test_a_load_that_goes_on_must_be_answered_in_time() -> None:
    world = Loading(load_timeout_ms=5_000)
    world.backend("b1", 1, "A", max_models=1, loading="A")
    assert of_type(world.advance(4_999), SessionClosed) == []
    [closed] = of_type(world.advance(1), SessionClosed)
    assert isinstance(closed, SessionClosed)
    assert closed.message == "A load was not answered in time."


def test_a_claim_of_who_ranks_after_it_keeps_no_first_place_from_a_model() -> None:
    """D is idle and nobody waits for it; what keeps slots for a wide request of C needs them, and
    they are not what B needs first."""
    world = Loading()
    world.backend("b1", 4, "BCD", max_models=2, resident="CD")
    world.run("CCC", "b1")
    world.ask("C", num_samples=2, band=1)
    assert world.reservation("b1") == "C"
    assert orders(world.submit("b", "B")) == [("b1", "B", ("D",))]
    assert world.reservation("b1") == "B"
    assert granted(world.loaded("b1", "B")) == [("b", "b1")]
