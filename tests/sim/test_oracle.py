"""What could be said of a wait: copies of a world that leave it as it was."""

import numpy as np

from bench.sim.compare import Plan, jobs_of, world_of
from bench.sim.oracle import Foresight, _best_guess, _Lengths, asked, shares
from bench.sim.workload import Fleet

_FLEET = Fleet(num_executors=1, num_slots=2)


def plan(policy: str) -> Plan:
    return Plan(policy, 0.9, 3, seconds=120, num_models=1, fleet=_FLEET)


def test_where_nobody_overtakes_known_lengths_tell_the_wait_to_the_millisecond() -> None:
    world = Foresight(plan("fifo"), until_ms=120_000, every=3, num_draws=2)
    journal = world.run()
    assert len(world.foreseen) > 5
    for request_id, (known_ms, drawn_ms) in world.foreseen.items():
        record = journal.records[request_id]
        assert record.granted_ms is not None
        assert record.granted_ms - record.job.due_ms == known_ms
        assert len(drawn_ms) == 2


def test_looking_ahead_changes_nothing() -> None:
    foresight = Foresight(plan("headway"), 120_000, 3, 1)
    assert foresight.run().log_hash == world_of(plan("headway")).run().log_hash
    assert foresight.foreseen


def test_nobody_is_asked_about_who_comes_later() -> None:
    world = Foresight(plan("headway"), until_ms=60_000, every=1, num_draws=1)
    journal = world.run()
    came_ms = [journal.records[request_id].job.due_ms for request_id in world.foreseen]
    assert 0 < max(came_ms) < 60_000 < max(job.due_ms for job in jobs_of(plan("headway")))


def test_shares_are_of_the_rows() -> None:
    rows = [(100.0, 100.0, 130.0, 120.0), (100.0, 1_100.0, 80.0, 20.0)]
    near = dict.fromkeys(("said", "lengths", "chances"), 0.5)
    assert shares(rows) == near | {"num": 2, "said_bias_s": 0.5}


def test_every_request_that_is_asked_about_has_all_guesses() -> None:
    rows = asked(plan("headway"), until_ms=60_000, num_asked=10, num_draws=2)
    assert len(rows) > 2
    assert all(len(row) == 4 and min(row) >= 0 for row in rows)


def test_the_best_guess_is_near_most() -> None:
    assert _best_guess([100, 101, 102, 1_000]) < 140


def test_drawn_lengths_go_with_what_is_known() -> None:
    lengths, random = _Lengths([10, 20, 30, 40]), np.random.default_rng(1)
    assert {lengths.draw(30, 10, random) for _ in range(50)} == {20, 30}
    assert lengths.draw(7, 5, random) == 7
