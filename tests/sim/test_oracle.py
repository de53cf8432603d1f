"""What could be said of a wait: copies of a world that leave it as it was."""

import numpy as np

from bench.sim.compare import Plan, world_of
from bench.sim.oracle import Foresight, _best_guess, _Lengths, shares
from bench.sim.workload import Fleet

_FLEET = Fleet(num_executors=1, num_slots=2)


def plan(policy: str) -> Plan:
    return Plan(policy, 0.9, 3, seconds=120, num_models=1, fleet=_FLEET)


def test_where_nobody_overtakes_known_lengths_tell_the_wait_to_the_millisecond() -> None:
    world = Foresight(plan("fifo"), every=3, num_draws=2)
    journal = world.run()
    assert len(world.foreseen) > 5
    for request_id, (known_ms, drawn_ms) in world.foreseen.items():
        record = journal.records[request_id]
        assert record.granted_ms is not None
        assert record.granted_ms - record.job.due_ms == known_ms
        assert len(drawn_ms) == 2


def test_looking_ahead_changes_nothing() -> None:
    assert (
        Foresight(plan("headway"), 3, 1).run().log_hash == world_of(plan("headway")).run().log_hash
    )


def test_shares_are_of_the_same_requests() -> None:
    figures = shares(plan("headway"), every=2, num_draws=3)
    assert figures["num"] > 5
    assert all(0 <= figures[name] <= 1 for name in ("said", "lengths", "chances"))


def test_the_best_guess_is_near_most() -> None:
    assert _best_guess([100, 101, 102, 1_000]) < 140


def test_drawn_lengths_go_with_what_is_known() -> None:
    lengths, random = _Lengths([10, 20, 30, 40]), np.random.default_rng(1)
    assert {lengths.draw(30, 10, random) for _ in range(50)} == {20, 30}
    assert lengths.draw(7, 5, random) == 7
