"""The log of an engine's steps: what each computed, and a bound on its size."""

import json
import threading
from pathlib import Path

import pytest
import structlog.testing

from executor_svc.core.engine import LeaseRequest, SamplingParams
from executor_svc.core.messages import StartLease
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.step_log import StepLog
from executor_svc.worker import Worker

FULL = Path("/dev/full")
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_of_a_worker_that_computed_is_there(tmp_path: Path) -> None:
    path, ended = tmp_path / "steps.jsonl", threading.Event()
    worker = Worker(
        lambda: MockEngine(MockConfig(step_ms=0.0)),
        max_backlog_tokens=100,
        step_log=StepLog(path, max_bytes=1 << 20),
    )
    worker.start(ended.set)
    worker.send(StartLease(LeaseRequest(1, "mock", range(7), PARAMS)))
    num_ends = 0
    while not num_ends:
        assert ended.wait(20)
        ended.clear()
        num_ends += len(worker.take().output.ends)
    assert worker.close(20)
    computed = [(line["decoded"], line["prefilled"]) for line in lines(path)]
    assert computed == [(0, 7), (1, 0), (1, 0)]
    assert all(line["ms"] >= 0 and line["thread_ms"] >= 0 for line in lines(path))


def test_steps_that_compute_nothing_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log, engine = StepLog(path, max_bytes=1 << 20), MockEngine(MockConfig(step_ms=0.0))
    log.step(engine)
    log.close()
    assert lines(path) == []


def test_it_stays_below_its_bound_and_goes_on_with_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    for _ in range(2):
        log, engine = StepLog(path, max_bytes=1_000), MockEngine(MockConfig(step_ms=0.0))
        for key in range(40):
            engine.add(LeaseRequest(16 * key, "mock", range(7), PARAMS))
            log.step(engine)
        log.close()
        assert 900 < path.stat().st_size <= 1_000
    assert all(line.keys() == {"decoded", "prefilled", "ms", "thread_ms"} for line in lines(path))


def test_a_file_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        StepLog(tmp_path / "nowhere" / "steps.jsonl", max_bytes=1_000)


@pytest.mark.skipif(not FULL.exists(), reason="needs a disk that is always full")
def test_a_full_disk_costs_the_log_and_not_the_engine() -> None:
    log, engine = StepLog(FULL, max_bytes=1 << 20), MockEngine(MockConfig(step_ms=0.0))
    engine.add(LeaseRequest(1, "mock", range(7), PARAMS))
    with structlog.testing.capture_logs() as said:
        outputs = [log.step(engine) for _ in range(3)]
        log.close()
    assert [len(output.key) for output in outputs] == [1, 1, 1]
    assert [line["event"] for line in said] == ["step_log.failed"]
