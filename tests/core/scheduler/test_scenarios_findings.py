"""Weaknesses and ambiguities of the reference (docs/scheduling.md) that no scenario covers.

W1: scenario 53. W2: 40. W4: 52. W7: 59, 60, 77, 78. W9: 58.
"""

import random
import sys
from types import FrameType
from typing import Any

import pytest

from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.core.messages import (
    Event,
    ExecutorAttached,
    LeaseEnded,
    LeaseGranted,
    LeaseOutcome,
    ModelLoadOrdered,
    ModelOffer,
    Submit,
)
from scheduler_svc.core.scheduler import Scheduler
from tests.core.scheduler.helpers import EPOCH, granted, interpreted_only, of_type, request
from tests.core.scheduler.test_scenarios import World

MINUTE_MS = 60_000


def random_day(bonus: int, seed: int) -> list[tuple[str, str]]:
    """The grants of a busy stretch with three models on three executors."""
    draw = random.Random(seed)
    world = World(bonus=bonus, load_ms=200, hold_ms=300, equalization_ms=2_000)
    world.run_ms = dict.fromkeys("ABC", 400)
    for number in range(3):
        world.backend(f"b{number}", 2, "ABC", max_models=1)
    for _ in range(60):
        world.ask(draw.choice("AAABBC"))
        world.advance(draw.randrange(150))
    world.advance(20_000)
    return granted(world.sent)


@pytest.mark.parametrize("seed", range(5))
def test_w3_the_bonus_is_a_unit_and_a_switch_and_changes_no_order(seed: int) -> None:
    days = [random_day(bonus, seed) for bonus in (1, 10, 1_000)]
    assert days[0] == days[1] == days[2]
    assert len(days[0]) == 60


def test_w5_one_hold_is_waived_on_the_executor_that_is_used() -> None:
    world = World(hold_ms=MINUTE_MS)
    for name in ("b1", "b2"):
        world.backend(name, 2, max_models=1, resident="A")
    names = world.ask("AA")
    world.done(*names)
    assert [world.row(name).held_models for name in ("b1", "b2")] == [("A",), ("A",)]
    [b] = world.ask("B")
    used = world.place(b)
    kept = {"b1": "b2", "b2": "b1"}[str(used)]
    assert world.row(kept).held_models == ("A",)


def test_w5_no_hold_is_waived_for_a_model_at_its_limit() -> None:
    world = World(hold_ms=MINUTE_MS, model_limits={"B": 1})
    world.backend("b1", 2, "B")
    world.run("B", "b1")
    world.backend("b2", 2, max_models=1, resident="A")
    world.done(*world.run("A", "b2"))
    world.ask("B")
    assert world.row("b2").held_models == ("A",)


def test_w6_forced_switches_stay_within_their_share_of_the_time() -> None:
    """Two models that always wait, one executor, loads of 2 s, a tenth of the time: 20 s apart."""
    load_ms, share, total_ms = 2_000, 0.1, 600_000
    world = World(load_ms=load_ms, switch_time_share=share, equalization_ms=1_000, hold_ms=3_000)
    world.run_ms = {"A": 500, "B": 500}
    world.backend("b1", 2, max_models=1, resident="A")
    loads = []
    for _ in range(total_ms // 500):
        waiting = [row.model for row in world.core.snapshot(world.now_ms, 99).queue]
        for model in "AB":
            world.ask(model * max(0, 3 - waiting.count(model)))
        loads += of_type(world.advance(500), ModelLoadOrdered)
    assert 2 <= len(loads) <= share * total_ms / load_ms + 1


def test_w8_the_drain_takes_the_executor_that_is_empty_soonest() -> None:
    world = World()
    world.run_ms = {"A": 10_000}
    world.backend("b2", 2, max_models=1, resident="A")
    world.ask("AA")  # ends in 10 s, which is how long leases of A take
    world.advance(10_000)
    world.ask("AA")
    world.advance(8_000)
    world.backend("b16", 16, max_models=1, resident="A")
    world.ask("A" * 3)
    assert [world.row(name).num_leased for name in ("b2", "b16")] == [2, 3]
    [b] = world.ask("B")
    assert (world.reservation("b2"), world.reservation("b16")) == ("B", None)
    world.advance(2_001)
    assert world.place(b) == "b2"


def instructions_of_a_decision(num_waiting: int) -> float:
    """Mean of the Python instructions that an end with the grant that follows takes: four executors
    that are full, eight models, ten tenants, and so many who wait."""
    core = Scheduler(CoreSettings(), EPOCH)
    models = "ABCDEFGH"
    offers = tuple(ModelOffer(model, is_resident=True) for model in models)
    running: list[LeaseGranted] = []

    def tell(event: Event) -> None:
        granted = core.handle(event, 1_000).send
        running.extend(action for action in granted if isinstance(action, LeaseGranted))

    for number in range(4):
        tell(ExecutorAttached(f"e{number}", 1, "i", 8, 8, offers))
    for number in range(num_waiting + 32):
        name, tenant = f"r{number}", f"t{number % 10}"
        tell(Submit(request(name, models[number % 8], tenant=tenant, band=number % 3)))
    assert core.num_waiting == num_waiting
    num_done = 0

    def count(frame: FrameType, event: str, _: object) -> Any:
        nonlocal num_done
        frame.f_trace_opcodes = True
        num_done += event == "opcode"
        return count

    before = sys.gettrace()
    for _ in range(50):
        lease = running.pop(0)
        ref = (lease.executor_id, lease.session, lease.request_id, EPOCH, lease.attempt)
        sys.settrace(count)
        tell(LeaseEnded(*ref, LeaseOutcome.COMPLETED, 20))
        sys.settrace(before)
    assert len(running) == 32
    return num_done / 50


@interpreted_only
def test_w10_a_decision_takes_no_longer_for_a_longer_queue() -> None:
    few = instructions_of_a_decision(100)
    assert few > 500, "it is counted"
    assert instructions_of_a_decision(5_000) < 1.2 * few


def test_w11_a_resident_model_is_used_before_an_idle_executor_loads_it() -> None:
    world = World(load_ms=5_000)
    world.backend("b1", 4, resident="A")
    world.run("AAA", "b1")
    world.backend("b2", 4)
    world.run("A", "b1")
    assert of_type(world.sent, ModelLoadOrdered) == []


def test_w11_a_model_that_is_loading_is_half_warm() -> None:
    world = World(load_ms=5_000)
    world.backend("b1", 1)
    world.ask("A")
    [row] = world.core.snapshot(world.now_ms, 1).queue
    assert row.priority == 5
    assert world.row("b1").loading_model == "A"


def test_w13_utilisation_is_over_the_time_there_was_and_grows_while_a_lease_runs() -> None:
    world = World()
    world.backend("b1", 2, "A", resident="A")
    world.run("A", "b1")
    world.advance(MINUTE_MS)
    stats = world.row("b1").stats
    assert stats is not None
    assert stats.utilisation == 0.5


def test_w15_what_ends_before_the_drain_may_start_meanwhile() -> None:
    """A's decode 100 tokens in 10 s; b1 drains and will be empty in about 10 s."""
    world = World()
    world.backend("b1", 2, max_models=1, resident="A")
    [first] = world.ask("A", max_tokens=100)
    world.start(first, "b1")
    world.advance(10_000)
    session = world.sessions["b1"]
    done = LeaseOutcome.COMPLETED
    world.handle(LeaseEnded("b1", session, first, EPOCH, 1, done, num_generated_tokens=100))
    world.run("A", "b1")
    world.backend("b2", 1, "A", max_models=1, resident="A")
    world.run("A", "b2")
    [b] = world.ask("B")
    assert world.reservation("b1") == "B"
    [long] = world.ask("A", max_tokens=200)
    assert world.place(long) is None
    world.cancel(long)
    [short] = world.ask("A", max_tokens=10)
    assert world.place(short) == "b1"
    assert world.place(b) is None


def test_a8_a_model_at_its_limit_keeps_no_room() -> None:
    for limit, reserved in ((1, None), (2, "B")):
        world = World(model_limits={"B": limit})
        world.backend("b3", 1, "B", resident="B")
        world.run("B", "b3")
        world.disconnect("b3")  # its lease is in doubt and counts; B has no home now
        world.backend("b1", 2, max_models=1, resident="A")
        world.run("A", "b1")
        world.backend("b2", 1, "A", max_models=1, resident="A")
        world.ask("B")
        assert world.reservation("b1") == reserved
