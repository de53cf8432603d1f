"""Corrections that are learned: they find a constant error, mix no kinds, and stay bounded."""

import pytest

from scheduler_svc.core.calibration import Calibration, kind

NEAR = kind("home", 0)


def learn(it: Calibration, raw_ms: float, real_ms: int, num: int) -> None:
    now_ms = 0
    for arrival in range(num):
        it.predicted(arrival, NEAR, raw_ms, now_ms)
        it.granted(arrival, now_ms + real_ms)
        now_ms += 1_000


def test_distances_are_powers_of_four() -> None:
    assert [kind("home", n)[1] for n in (0, 1, 3, 4, 15, 16, 63, 64, 5_000)] == [
        *(0, 1, 1, 2, 2, 3, 3, 4, 4)
    ]


@pytest.mark.parametrize("real_ms", [250, 1_000, 3_000])
def test_a_constant_error_is_found(real_ms: int) -> None:
    it = Calibration()
    learn(it, 1_000.0, real_ms, 200)
    assert it.corrected(NEAR, 1_000.0) == pytest.approx(real_ms, rel=0.01)
    assert it.corrected(kind("none", 0), 1_000.0) == 1_000, "another kind is another error"


def test_one_absurd_wait_moves_little_and_no_number_of_them_moves_without_end() -> None:
    it = Calibration()
    learn(it, 1_000.0, 10**9, 1)
    assert it.corrected(NEAR, 1_000.0) < 1_150
    learn(it, 1_000.0, 10**9, 2_000)
    assert it.corrected(NEAR, 1_000.0) <= 10_000


def test_the_first_truths_weigh_most() -> None:
    first, later = Calibration(), Calibration()
    learn(first, 1_000.0, 2_000, 1)
    learn(later, 1_000.0, 1_000, 100)
    learn(later, 1_000.0, 2_000, 1)
    assert first.corrected(NEAR, 1_000.0) > 1_080
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
