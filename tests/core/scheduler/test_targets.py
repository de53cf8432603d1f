"""Where a model is loaded, what leaves for it, whether it is worth it, and what a switch costs."""

from scheduler_svc.core.messages import ModelLoadOrdered, Tick
from tests.core.scheduler.helpers import Driver, of_type
from tests.core.scheduler.test_residency import Loading, orders
from tests.core.scheduler.test_scenarios import World


def test_free_memory_before_an_idle_model_and_the_longest_unused_of_those() -> None:
    world = Loading()
    world.backend("b1", 2, "ABCD", max_models=3, resident="ABC")
    for model in "CAB":
        world.advance(10)
        world.done(*world.run(model, "b1"))
    assert orders(world.submit("d", "D")) == [("b1", "D", ("C",))]
    world.backend("b2", 2, "E", max_models=1)
    world.backend("b3", 2, "ABE", max_models=3, resident="AB")
    world.backend("b4", 2, "ABE", max_models=2, resident="AB")
    assert orders(world.submit("e", "E")) == [("b2", "E", ())]


def test_a_second_place_is_loaded_only_if_waiting_would_take_longer() -> None:
    world = Loading(load_ms=1_000)
    world.backend("b1", 1, "A", resident="A")
    [running] = world.run("A", "b1")
    world.advance(400)
    world.done(running)
    [running] = world.run("A", "b1")
    world.backend("b2", 1, "A")
    assert orders(world.submit("x", "A") + world.submit("y", "A")) == []
    assert orders(world.submit("z", "A")) == [("b2", "A", ())]  # 3 x 400 ms


def test_a_hold_is_waived_on_one_executor_and_only_by_a_load() -> None:
    """W5: not on both, and not for a model at its limit."""
    world = Loading(hold_ms=60_000, model_limits={"C": 1})
    for name in ("b1", "b2"):
        world.backend(name, 1, "ABC", max_models=1, resident="A")
    world.done(*world.run("A", "b1"), *world.run("A", "b2"))
    assert len(orders(world.submit("b", "B"))) == 1
    assert [world.row(name).held_models for name in ("b1", "b2")] in [[(), ("A",)], [("A",), ()]]


def test_an_idle_executor_goes_to_whoever_waits_longest() -> None:
    """Budget and hold protect work that somebody waits for, not an executor that does nothing."""
    world = Loading(hold_ms=60_000, switch_time_share=0.1)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    world.done(*world.run("A", "b1"))
    assert orders(world.submit("b", "B")) == [("b1", "B", ("A",))]
    world.advance(1_000)
    world.loaded("b1", "B", 1_000)
    world.end("b", "b1")
    assert orders(world.submit("a", "A")) == [("b1", "A", ("B",))]


def test_an_executor_with_one_slot_stays_with_its_model_while_somebody_waits_for_it() -> None:
    """It is idle for a moment at each end. With two models asked for in turn, going where somebody
    waits a little longer would be a load for every second request."""
    world = World(load_ms=1_000, equalization_ms=30_000)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    world.run_ms = {"A": 500, "B": 500}
    for _ in range(10):
        world.ask("AB")
        world.advance(10)
    world.advance(30_000)
    assert world.core.num_waiting == 0
    assert len(of_type(world.sent, ModelLoadOrdered)) == 2


def test_a_model_at_its_limit_keeps_no_executor_from_others() -> None:
    """Somebody waits for A, but could not run there."""
    world = World(load_ms=1_000, model_limits={"A": 1})
    world.backend("b1", 1, "A", max_models=1, resident="A")
    world.run("A", "b1")
    world.backend("b2", 1, "AB", max_models=1, resident="A")
    world.ask("AB")
    assert world.row("b2").loading_model == "B"


def test_a_model_that_nobody_holds_or_wants_costs_no_budget() -> None:
    world = Loading(hold_ms=0, switch_time_share=0.01)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    for name, model in (("b", "B"), ("a", "A"), ("c", "B")):
        assert len(orders(world.submit(name, model))) == 1
        world.loaded("b1", model, 5_000)
        world.end(name, "b1")
    assert world.core.decisions["load"] == 3


def test_the_shortest_load_time_follows_what_is_measured() -> None:
    driver = Driver()
    for name in ("b1", "b2"):
        driver.attach(name, models="AB")
    fleet = driver.core._state.fleet
    b1, b2 = fleet.executors["b1"], fleet.executors["b2"]
    assert fleet.offer("A").load_ms is None
    shortest = []
    for executor, load_ms in ((b1, 80), (b2, 50), (b1, 70), (b2, 90), (b1, 60), (b2, 60), (b1, 99)):
        fleet.load_took("A", executor, load_ms)
        shortest.append(fleet.offer("A").load_ms)
    assert shortest == [80, 50, 50, 70, 60, 60, 60]
    assert fleet.offer("B").load_ms is None


def test_a_forced_switch_dwells_by_what_the_load_took() -> None:
    world = Loading(load_ms=1_000, switch_time_share=0.1, equalization_ms=100)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    world.run("A", "b1")
    world.submit("b", "B")
    world.ask("A")
    world.advance(200)
    assert orders(world.done("A1")) == [("b1", "B", ("A",))]
    executor = world.core._state.fleet.executors["b1"]
    world.advance(3_000)
    world.loaded("b1", "B", 3_000)
    assert executor.next_switch_ms == world.now_ms + 30_000


def test_a_model_at_its_limit_costs_whoever_takes_its_place_no_budget() -> None:
    world = Loading(load_ms=1_000, model_limits={"A": 1})
    world.backend("b1", 1, "A", max_models=1, resident="A")
    world.run("A", "b1")
    world.backend("b2", 1, "AB", max_models=1, resident="A")
    world.core._state.fleet.executors["b2"].next_switch_ms = 10**9
    world.ask("A")
    assert orders(world.submit("b", "B")) == [("b2", "B", ("A",))]


def test_of_two_executors_the_one_that_loads_sooner_is_chosen() -> None:
    world = Loading()
    for name, load_ms in (("b1", 5_000), ("b2", 1_000), ("b3", 3_000)):
        world.load_ms = load_ms
        world.backend(name, 1, "A", max_models=1)
    assert orders(world.submit("a", "A")) == [("b2", "A", ())]


def test_a_model_that_nobody_needs_leaves_before_one_that_somebody_waits_for() -> None:
    """C was used later, but A is wanted, though it is at its limit."""
    world = Loading(hold_ms=0, model_limits={"A": 1})
    world.backend("b3", 1, "A", max_models=1, resident="A")
    world.run("A", "b3")
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    world.backend("b2", 1, "BC", max_models=1, resident="C")
    world.advance(10)
    world.done(*world.run("C", "b2"))
    world.ask("A")
    assert orders(world.submit("b", "B")) == [("b2", "B", ("C",))]


def test_one_more_place_is_worth_less_where_many_slots_serve_the_model() -> None:
    world = Loading(load_ms=1_000)
    world.backend("b1", 4, "A", resident="A")
    running = world.run("AAAA", "b1")
    world.advance(400)
    world.done(*running)
    world.run("AAAA", "b1")
    world.backend("b2", 1, "A")
    sent = [action for number in range(9) for action in world.submit(f"w{number}", "A")]
    assert orders(sent) == [], "9 x 400 ms / 4"
    assert orders(world.submit("w9", "A")) == [("b2", "A", ())]


def test_a_model_that_nobody_wants_any_more_makes_room_for_one_more_place_of_another() -> None:
    """A wide request for A claims b4, so A stays on b1 too, which is idle; then it gives up."""
    world = Loading(hold_ms=0)
    world.backend("b4", 2, "YA", max_models=2, resident="YA")
    world.run("Y", "b4")
    world.backend("b1", 2, "XAC", max_models=2, resident="XA")
    world.run("X", "b1")
    world.backend("b2", 1, "C", max_models=1, resident="C")
    world.run("C", "b2")
    [a] = world.ask("A", num_samples=2)
    assert [world.reservation(name) for name in ("b4", "b1")] == ["A", None]
    assert orders(world.submit("c", "C")) == []
    assert orders(world.cancel(a)) == [("b1", "C", ("A",))]


def test_a_backlog_gets_all_the_places_that_are_worth_it_at_once() -> None:
    """Both executors failed in the same millisecond and may try again in the same one."""
    world = Loading(load_backoff_ms=100, max_load_failures=9)
    world.backend("b1", 1, "A")
    world.backend("b2", 1, "A")
    world.submit("x", "A")
    world.submit("y", "A")
    world.failed("b1", "A")
    world.failed("b2", "A")
    world.now_ms += 100
    assert orders(world.handle(Tick())) == [("b1", "A", ()), ("b2", "A", ())]


def test_whichever_chance_comes_first_is_looked_at() -> None:
    """b1 may try again after 100 ms, and b2 be drained after E."""
    world = Loading(load_backoff_ms=100)
    world.backend("b1", 1, "B", max_models=1)
    world.backend("b2", 1, "AB", max_models=1, resident="A")
    world.run("A", "b2")
    assert orders(world.submit("b", "B")) == [("b1", "B", ())]
    assert orders(world.failed("b1", "B")) == []
    assert orders(world.advance(101)) == [("b1", "B", ())]
