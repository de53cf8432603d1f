"""Corrections that are learned: they find a constant error, mix no kinds, and stay bounded."""

import pytest

from scheduler_svc.core.calibration import Calibration, kind

NEAR = kind("home", 0, 0)


def learn(it: Calibration, raw_ms: float, real_ms: int, num: int) -> None:
    now_ms = 0
    for arrival in range(num):
        it.predicted(arrival, NEAR, raw_ms, now_ms)
        it.granted(arrival, now_ms + real_ms)
        now_ms += 1_000


def test_distances_are_powers_of_four() -> None:
    assert [kind("home", n, 0)[1] for n in (0, 1, 3, 4, 15, 16, 63, 64, 5_000)] == [
        *(0, 1, 1, 2, 2, 3, 3, 4, 4)
    ]


@pytest.mark.parametrize("real_ms", [250, 1_000, 3_000])
def test_a_constant_error_is_found(real_ms: int) -> None:
    it = Calibration()
    learn(it, 1_000.0, real_ms, 1_000)
    assert it.corrected(NEAR, 1_000.0) == pytest.approx(real_ms, rel=0.01)
    assert it.corrected(kind("home", 1, 0), 1_000.0) == 1_000, "another kind is another error"


def test_who_stands_behind_its_own_backlog_is_another_kind() -> None:
    """Newcomers of tenants that ask for less go before it, not before others."""
    quarters = [kind("home", 20, num_own)[2] for num_own in (0, 4, 5, 10, 14, 15, 20)]
    assert quarters == [0, 0, 1, 2, 2, 3, 3]
    assert kind("home", 3, 3) == kind("home", 3, 0), "among so few it makes no difference yet"


def test_a_place_that_is_yet_to_come_comes_later_than_it_looks() -> None:
    it = Calibration()
    assert it.corrected(kind("home", 9, 9), 1_000.0) == 1_000
    for situation in ("loading", "drain", "none"):
        assert it.corrected(kind(situation, 0, 0), 1_000.0) == 1_250


def test_one_absurd_wait_moves_little_and_no_number_of_them_moves_without_end() -> None:
    it = Calibration()
    learn(it, 1_000.0, 10**9, 1)
    assert it.corrected(NEAR, 1_000.0) < 1_070
    learn(it, 1_000.0, 10**9, 2_000)
    assert it.corrected(NEAR, 1_000.0) <= 10_000


def test_the_first_truths_weigh_most() -> None:
    first, later = Calibration(), Calibration()
    learn(first, 1_000.0, 2_000, 1)
    learn(later, 1_000.0, 1_000, 100)
    learn(later, 1_000.0, 2_000, 1)
    assert first.corrected(NEAR, 1_000.0) > 1_060
    assert 1_000 < later.corrected(NEAR, 1_000.0) < 1_020


def test_who_did_not_wait_teaches_nothing_and_samples_are_rationed() -> None:
    it = Calibration()
    it.predicted(1, NEAR, 1_000.0, 5)
    assert not it.wants_sample(6)
    assert it.wants_sample(1_005)
    it.granted(1, 5)
    it.granted(2, 50)
    assert it.corrected(NEAR, 1_000.0) == 1_000


def test_estimates_whose_truth_never_comes_are_forgotten() -> None:
    it = Calibration()
    for arrival in range(5_000):
        it.predicted(arrival, NEAR, 1_000.0, arrival)
    assert len(it._samples) == 1_000
