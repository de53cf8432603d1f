"""When a model that has no place will get one."""

from scheduler_svc.core.messages import LeaseEnded, LeaseOutcome
from tests.core.scheduler.helpers import EPOCH
from tests.core.scheduler.test_scenarios import World

LOAD_MS = 500


def fleet(*residents: str) -> World:
    """An executor of one slot for each resident model; every lease takes 4 s."""
    world = World(load_ms=LOAD_MS)
    for number, model in enumerate(residents):
        world.backend(f"b{number}", 1, "ABCDE", max_models=1, resident=model)
    for number, model in enumerate(residents):
        world.submit(f"first {number}", model)
    world.advance(4_000)
    for number, model in enumerate(residents):
        name = f"first {number}"
        ref = (f"b{number}", world.sessions[f"b{number}"], name, EPOCH, world.attempts[name])
        world.handle(LeaseEnded(*ref, LeaseOutcome.COMPLETED))
        world.submit(f"busy {number}", model)
    return world


def place_in_ms(world: World, model: str) -> float:
    return world.core._state.estimator._outlook.place_in_ms(model, world.now_ms)


def test_an_executor_is_free_when_all_who_wait_for_it_are_served() -> None:
    world = fleet("A")
    world.submit("c", "C")
    # half of what runs, and as much again until the last slot is idle
    assert place_in_ms(world, "C") == 2_000 + 2_000
    for name in "xyz":
        world.submit(name, "A")
        world.advance(1)
    assert place_in_ms(world, "C") == 4_000 + 3 * 4_000
    status = world.status("c")
    assert status.estimated_wait_ms is not None
    # and then the load, and its own lease's turn
    assert status.estimated_wait_ms >= 16_000


def test_it_takes_the_executor_that_is_free_first() -> None:
    world = fleet("A", "B")
    world.submit("a", "A")
    world.submit("c", "C")
    assert place_in_ms(world, "C") == 4_000


def test_models_with_a_larger_claim_go_first() -> None:
    world = fleet("A", "B")
    world.submit("a", "A")
    world.submit("c", "C")
    world.advance(10)
    world.submit("d", "D")
    world.advance(10)
    assert place_in_ms(world, "C") == 4_000
    assert place_in_ms(world, "D") == 8_000, "the second executor"
    world.submit("e", "E")
    assert place_in_ms(world, "E") == 8_000 + 4_000, "all executors once more, and the first"
    for name in "xyz":
        world.submit(name, "E")
    world.advance(30)
    assert place_in_ms(world, "E") == 4_000, "four that wait have waited for more than one"


def test_a_model_that_is_due_goes_before_every_claim() -> None:
    world = fleet("A")
    world.submit("c", "C", queue_timeout_ms=10**9)
    for number in range(6):
        world.submit(f"a{number}", "A", queue_timeout_ms=10**9)
    world.advance(29_000)
    for number in range(40):
        world.submit(f"d{number}", "D", queue_timeout_ms=10**9)
    world.advance(999)
    before = place_in_ms(world, "C"), place_in_ms(world, "D")
    assert before[0] > before[1]
    outlook = world.core._state.estimator._outlook
    assert outlook._num_before("C", world.now_ms) == 1
    assert outlook._num_before("C", world.now_ms + 1) == 0


def test_a_model_that_nobody_serves_now_has_no_outlook() -> None:
    world = fleet("A")
    world.submit("c", "C")
    world.disconnect("b0")
    assert world.status("c").estimated_wait_ms is None


def test_who_waits_is_spread_over_the_homes_of_a_model() -> None:
    world = fleet("A", "A")
    for name in "wxyz":
        world.submit(name, "A")
        world.advance(1)
    world.submit("c", "C")
    assert place_in_ms(world, "C") == 4_000 + 2 * 4_000


def test_an_executor_that_loads_has_that_before_it() -> None:
    world = fleet("A")
    world.backend("b1", 1, "FG", max_models=1)
    world.submit("f", "F")
    assert world.row("b1").loading_model == "F"
    # then the one who waits for it, and half a lease until the last slot is idle
    assert place_in_ms(world, "G") == LOAD_MS + 4_000 + 2_000
    world.advance(200)
    assert place_in_ms(world, "G") == LOAD_MS - 200 + 4_000 + 2_000


def test_an_executor_that_an_operator_drains_is_not_counted_on() -> None:
    world = fleet("A", "B")
    world.submit("c", "C")
    world.submit("b", "B")
    assert place_in_ms(world, "C") == 4_000
    world.drain("b0")
    assert place_in_ms(world, "C") == 8_000
