"""Scenarios 25-41: who goes first, without a warm bonus (FIFO) and with it (hybrid)."""

from headway.reasons import Reason
from tests.core.scheduler.helpers import finished, granted, rejection
from tests.core.scheduler.test_scenarios import World

# --- FIFO: warm_bonus 0 ---------------------------------------------------------------------


def test_scenario_25_a_blocked_head_does_not_block_others() -> None:
    world = World(bonus=0)
    world.backend("b1", 1, "A")
    world.backend("b2", 1, "B")
    world.run("A", "b1")
    [running] = world.run("B", "b2")
    a, b = world.ask("AB")
    world.done(running)
    assert world.places(a, b) == [None, "b2"]


def test_scenario_26_arrival_order_and_no_diversity() -> None:
    world = World(bonus=0)
    world.backend("b1", 2)
    world.run("A", "b1")
    with world.closed():
        a, b = world.ask("AB")
    assert world.places(a, b) == ["b1", None]


def test_scenario_27_a_hold_ends_without_any_other_event() -> None:
    world = World(bonus=0, hold_ms=50)
    world.backend("b1", 1, max_models=1)
    world.done(*world.run("A", "b1"))
    [b] = world.ask("B")
    assert world.place(b) is None
    world.advance(49)
    assert world.place(b) is None
    world.advance(51)
    assert world.place(b) == "b1"


def test_scenario_28_who_gave_up_or_was_too_late_takes_no_slot() -> None:
    world = World(bonus=0)
    world.backend("b1", 1)
    [running] = world.run("A", "b1")
    [cancelled] = world.ask("A")
    [late] = world.ask("A", queue_timeout_ms=500)
    [patient] = world.ask("A")
    world.cancel(cancelled)
    world.advance(501)
    assert finished(world.sent) == {cancelled: Reason.CANCELLED, late: Reason.QUEUE_TIMEOUT}
    assert granted(world.done(running)) == [(patient, "b1")]


def test_scenario_29_a_request_without_a_model_is_refused() -> None:
    """Settled otherwise: our contract has no request for whichever model is there."""
    world = World(bonus=0)
    world.backend("b1", 1)
    assert rejection(world.submit("r", model="")).reason is Reason.MODEL_NOT_FOUND


def test_scenario_30_without_capacity_it_is_a_503_at_the_latest_at_the_timeout() -> None:
    """Settled: refused at once where waiting cannot help, else queued until the timeout."""
    world = World(bonus=0, executor_grace_ms=100)
    assert rejection(world.submit("early")).reason is Reason.NO_CAPACITY
    world.backend("b1", 1, "A")
    assert rejection(world.submit("unknown", "X")).reason is Reason.MODEL_NOT_FOUND
    world.run("A", "b1")
    [waiting] = world.ask("A", queue_timeout_ms=5_000)
    world.disconnect("b1")
    world.advance(4_999)
    assert waiting not in finished(world.sent)
    world.advance(2)
    assert finished(world.sent)[waiting] is Reason.QUEUE_TIMEOUT


# --- hybrid: warm_bonus 10, equalization 30 s -----------------------------------------------


def test_scenario_31_a_warm_model_fills_free_slots_if_nothing_else_waits() -> None:
    world = World()
    world.backend("b1", 3, "A")
    world.run("A", "b1")
    with world.closed():
        waiting = world.ask("AA")
    assert world.places(*waiting) == ["b1", "b1"]


def test_scenario_32_a_model_that_runs_nowhere_goes_first() -> None:
    world = World()
    world.backend("b1", 2)
    world.run("A", "b1")
    with world.closed():
        b, a = world.ask("BA")
    assert world.places(b, a) == ["b1", None]


def test_scenario_33_diversity_beats_the_warm_bonus() -> None:
    world = World()
    world.backend("b1", 2)
    world.run("A", "b1")
    with world.closed():
        a, b = world.ask("AB")
    assert world.places(a, b) == [None, "b1"]


def test_scenario_34_the_cold_model_takes_the_other_executor() -> None:
    world = World()
    world.backend("b1", 1, max_models=1)
    world.run("A", "b1")
    world.backend("b2", 1, max_models=1)
    with world.closed():
        a, b = world.ask("AB")
    assert world.places(a, b) == [None, "b2"]


def test_scenario_35_diversity_respects_max_models() -> None:
    world = World()
    world.backend("b1", 2, max_models=1)
    world.run("A", "b1")
    with world.closed():
        a, b = world.ask("AB")
    assert world.places(a, b) == ["b1", None]


def test_scenario_36_a_cold_model_waives_the_hold_that_is_in_its_way() -> None:
    for max_models in (8, 1):
        world = World(hold_ms=60_000)
        world.backend("b1", 2, max_models=max_models)
        world.done(*world.run("A", "b1"))
        assert world.row("b1").held_models == ("A",)
        with world.closed():
            _, b = world.ask("AB")
        assert world.place(b) == "b1"


def test_scenario_37_waiting_beats_the_warm_bonus_in_the_end() -> None:
    world = World(equalization_ms=100)
    world.backend("b1", 2)
    world.run("A", "b1")
    with world.closed():
        [b] = world.ask("B")
        world.advance(150)
        [a] = world.ask("A")
    assert world.places(b, a) == ["b1", None]


def test_scenario_38_the_second_request_of_a_cold_model_follows_at_once() -> None:
    world = World()
    world.backend("b1", 1)
    world.backend("b2", 1)
    with world.closed():
        waiting = world.ask("AA")
    assert sorted(map(str, world.places(*waiting))) == ["b1", "b2"]


def test_scenario_39_of_three_cold_models_the_two_oldest_start() -> None:
    world = World()
    world.backend("b1", 1, "ABC")
    world.backend("b2", 1, "ABC")
    with world.closed():
        a, b, c = world.ask("ABC")
    assert sorted(map(str, world.places(a, b))) == ["b1", "b2"]
    assert world.place(c) is None


def test_scenario_40_a_burst_in_one_millisecond_keeps_its_order() -> None:
    for num_backends in (1, 8):
        world = World()
        for number in range(num_backends):
            world.backend(f"b{number}", 1, "A")
        burst = world.ask("A" * (num_backends + 250))
        order = burst[:num_backends]
        for number in range(250):
            [(name, _)] = granted(world.done(order[number]))
            order.append(name)
        assert order == burst


def test_scenario_41_a_held_model_is_warm_and_an_evicted_one_is_cold() -> None:
    """A waits behind C on b1; its row tells whether it has the bonus.

    Settled (W11): weights on the device are warm as long as they are there. What ends with the
    hold is the protection, so a cold model can evict them from then on.
    """
    world = World(bonus=10, equalization_ms=30_000, hold_ms=1_000)
    world.backend("b1", 1, "ABC", max_models=2)
    world.done(*world.run("A", "b1"))
    [running] = world.run("C", "b1")
    world.ask("A")

    def bonus() -> float:
        [row] = world.core.snapshot(world.now_ms, 1).queue
        assert row.priority is not None
        return row.priority - row.waited_ms / 1_000 * 10 / 30

    assert round(bonus(), 6) == 10
    world.cancel("A2")
    world.advance(1_001)
    assert world.row("b1").held_models == ()
    world.done(running)
    world.run("B", "b1")
    assert set(world.row("b1").resident_models) == {"B", "C"}
    world.change("b1", 1, max_models=1)  # B runs, so A cannot even be loaded
    world.ask("A")
    assert round(bonus(), 6) == 0
