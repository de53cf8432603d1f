"""The three engine models: what they agree on, and what sets them apart."""

import pytest

from bench.sim.costs import Costs
from bench.sim.engines import ENGINES, Engine, SlotEngine

COSTS = Costs(step_ms=10.0, sequence_ms=1.0, prefill_ms=0.1, chunk_tokens=512)
SLOTS = 4


def engine(name: str) -> Engine:
    return ENGINES[name](COSTS, SLOTS)


def times(engine: Engine, until: float = 1e6) -> dict[tuple[str, bool], float]:
    """When what happened, asking the engine itself when to look."""
    seen: dict[tuple[str, bool], float] = {}
    while (now := engine.next_ms()) <= until:
        for happening in engine.advance(now):
            seen[happening] = now
    return seen


@pytest.mark.parametrize("name", ["fluid", "step"])
def test_alone_a_lease_takes_its_prefill_and_its_tokens(name: str) -> None:
    it = engine(name)
    it.start("a", 100, 20, 0.0)
    seen = times(it)
    prefill_ms, token_ms = 10.0, 11.0
    first = prefill_ms + token_ms
    assert seen["a", False] == pytest.approx(first)
    assert seen["a", True] == pytest.approx(prefill_ms + 20 * token_ms)


def test_the_slot_model_always_counts_a_full_batch() -> None:
    it = engine("slot")
    it.start("a", 100, 20, 0.0)
    assert times(it)["a", True] == pytest.approx(10.0 + 20 * 14.0)


@pytest.mark.parametrize("name", list(ENGINES))
def test_everything_that_starts_has_one_first_token_and_one_end(name: str) -> None:
    it, happened = engine(name), []
    for number in range(SLOTS):
        happened += it.advance(7.0 * number)
        it.start(f"{number}", 300 * number + 1, 5 + number, 7.0 * number)
    happened += it.advance(1e6)
    assert sorted(happened) == sorted(
        (f"{number}", is_end) for number in range(SLOTS) for is_end in (False, True)
    )


@pytest.mark.parametrize("name", list(ENGINES))
def test_a_stopped_lease_is_silent_and_the_others_go_on(name: str) -> None:
    it = engine(name)
    it.start("a", 10, 100, 0.0)
    it.start("b", 10, 100, 0.0)
    it.advance(300.0)
    assert 10 < it.stop("a", 300.0) < 40
    assert set(times(it)) == {("b", True)}


def test_in_the_fluid_and_step_models_company_costs_speed() -> None:
    for name in ("fluid", "step"):
        alone, together = engine(name), engine(name)
        alone.start("a", 1, 100, 0.0)
        for key in "abcd":
            together.start(key, 1, 100, 0.0)
        ratio = times(together)["a", True] / times(alone)["a", True]
        assert ratio == pytest.approx(14 / 11, rel=0.03), name


def test_a_prompt_that_comes_waits_for_the_running_step_only_in_the_step_model() -> None:
    seen = {}
    for name in ("fluid", "step"):
        it = engine(name)
        it.start("a", 1, 100, 0.0)
        it.advance(15.0)
        it.start("b", 1, 100, 15.0)
        seen[name] = times(it)["b", False]
    assert seen["step"] > seen["fluid"] + 3


def test_leases_can_be_given_other_lengths_as_they_run() -> None:
    engine = SlotEngine(Costs(step_ms=10.0, sequence_ms=0.0, prefill_ms=0.0), 2)
    engine.start("a", 1, 5, 0.0)
    engine.start("b", 1, 50, 0.0)
    engine.advance(30.0)
    told = {}

    def draw(key: str, num_so_far: int) -> int:
        told[key] = num_so_far
        return {"a": 20, "b": 4}[key]

    assert engine.redraw(draw, 30.0) == {"a": 20, "b": 4}
    assert told == {"a": 3, "b": 3}
    assert engine.advance(1_000.0) == [("b", True), ("a", True)]
