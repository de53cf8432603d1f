"""The fit of costs from steps."""

import itertools

import numpy as np
import pytest

from bench.sim.calibrate import Row, fit, non_negative_least_squares, step_log
from executor_svc.mock_engine import MockConfig, MockEngine


def test_the_constants_of_an_exact_engine_are_found() -> None:
    rows = [
        Row(n, n * p, 5.0 + 0.5 * n + 0.02 * n * p) for n in (1, 2, 4, 8) for p in (0, 16, 48, 64)
    ]
    found = fit(rows)
    assert (found.step_ms, found.sequence_ms, found.prefill_ms) == pytest.approx((5.0, 0.5, 0.02))
    assert found.max_relative_error == pytest.approx(0, abs=1e-9)


def test_no_constant_is_negative() -> None:
    """The plain solution is (2, -1)."""
    matrix, wanted = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), np.array([2.0, 1.0, -1.0])
    assert non_negative_least_squares(matrix, wanted) == pytest.approx([1.5, 0.0])
    assert non_negative_least_squares(-matrix[:1], wanted[:1]) == pytest.approx([0.0, 0.0])


def test_a_step_log_has_every_kind_of_step() -> None:
    """The clock ticks once a reading, so every step takes one second."""
    clock = map(float, itertools.count())
    rows = step_log(MockEngine(MockConfig(num_slots=8, step_ms=0.0)), lambda: next(clock))
    assert {row.ms for row in rows} == {1_000.0}
    kinds = {(row.num_sequences, row.num_prefill_tokens) for row in rows}
    assert {(1, 0), (8, 0), (1, 64), (8, 512)} <= kinds
    assert len(kinds) == len(rows)
