"""The fit of costs from steps."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from bench.sim.calibrate import Row, drive, fit, kinds, main, non_negative_least_squares, read
from executor_svc.core.engine import LeaseRequest, SamplingParams
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.step_log import StepLog


def test_the_constants_of_an_exact_engine_are_found() -> None:
    rows = [
        Row(n, n * p, 5.0 + 0.5 * n + 0.02 * n * p) for n in (1, 2, 4, 8) for p in (0, 16, 48, 64)
    ]
    found = fit(rows)
    assert (found.step_ms, found.sequence_ms, found.prefill_ms) == pytest.approx((5.0, 0.5, 0.02))
    assert found.p90_relative_error == pytest.approx(0, abs=1e-9)


def test_no_constant_is_negative() -> None:
    """The plain solution is (2, -1)."""
    matrix, wanted = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), np.array([2.0, 1.0, -1.0])
    assert non_negative_least_squares(matrix, wanted) == pytest.approx([1.5, 0.0])
    assert non_negative_least_squares(-matrix[:1], wanted[:1]) == pytest.approx([0.0, 0.0])


def test_one_step_stands_for_all_that_computed_the_same() -> None:
    steps = [Row(2, 0, 7.0), Row(1, 0, 4.0), Row(2, 0, 5.0), Row(2, 0, 30.0)]
    assert kinds(steps, 0.0) == [Row(1, 0, 4.0), Row(2, 0, 5.0)]
    assert kinds(steps, 0.5, least_repeats=2) == [Row(2, 0, 7.0)]


def test_a_driven_engine_shows_every_kind_of_step() -> None:
    """The clock ticks once a reading, so every step takes one second."""
    clock = map(float, itertools.count())
    steps = drive(MockEngine(MockConfig(num_slots=8, step_ms=0.0)), lambda: next(clock), 1)
    assert {step.ms for step in steps} == {1_000.0}
    found = {(step.num_decoded, step.num_prefilled) for step in steps}
    assert {(1, 0), (8, 0), (0, 64), (0, 512)} <= found


def test_the_log_of_an_executor_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.jsonl"
    engine, log = MockEngine(MockConfig(step_ms=0.0)), StepLog(path, max_bytes=1 << 20)
    for _ in range(3):
        for key in range(1, 6):
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            engine.add(LeaseRequest(16 * key, "mock", range(10 * key), params))
            log.step(engine)
        while engine.has_work():
            log.step(engine)
    log.close()
    steps = read(path, "thread_ms")
    assert [step[:2] for step in steps[:6]] == [(0, 10), (1, 20), (2, 30), (3, 40), (4, 50), (5, 0)]
    assert main(["--log", str(path)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["of"], figures["num_steps"]) == ("log", len(steps))


def test_a_log_that_says_too_little_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"decoded": 1, "prefilled": 0, "ms": 5.0, "thread_ms": 4.0}\n' * 9)
    with pytest.raises(SystemExit):
        main(["--log", str(path)])
    assert "1 kinds of steps" in capsys.readouterr().err
