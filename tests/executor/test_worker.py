"""The engine's thread: order, merging, the limit of its backlog, and its end."""

import threading
from collections.abc import Callable, Iterator

import pytest

from executor_svc.core.engine import (
    InvalidLeaseError,
    LeaseRequest,
    ModelLoadError,
    SamplingParams,
    StepOutput,
)
from executor_svc.core.messages import (
    AbortLease,
    LeaseRefused,
    LoadModel,
    ModelLoaded,
    ModelLoadFailed,
    StartLease,
)
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.mock_formulas import mock_tokens
from executor_svc.worker import EngineDiedError, Worker
from headway.reasons import Reason

TIMEOUT_S = 60.0


class ScriptedEngine(MockEngine):
    """A mock whose every step waits for the test."""

    def __init__(self) -> None:
        models = ("mock", "other", "third", "broken")
        super().__init__(MockConfig(models=models, max_models=2, step_ms=0, vocab_size=1000))
        self.load_permits = threading.Semaphore(0)
        self.loads_begun = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.steps_begun = threading.Semaphore(0)
        self.fault: Exception | None = None
        self.is_closed = False

    def add(self, request: LeaseRequest) -> None:
        if request.params.seed == 13:
            raise InvalidLeaseError(Reason.INVALID_REQUEST, "unlucky")
        super().add(request)

    def load(self, model: str, evict: tuple[str, ...]) -> int:
        self.loads_begun.release()
        assert self.load_permits.acquire(timeout=TIMEOUT_S)
        if model == "broken":
            raise ModelLoadError("it is broken")
        return super().load(model, evict)

    def step(self) -> StepOutput:
        self.steps_begun.release()
        assert self.permits.acquire(timeout=TIMEOUT_S)
        if self.fault is not None:
            raise self.fault
        return super().step()

    def close(self) -> None:
        super().close()
        self.is_closed = True


class Bench:
    """A worker and the notices it gave."""

    def __init__(self, max_backlog_tokens: int = 1000) -> None:
        self.engine = ScriptedEngine()
        self.notices = threading.Semaphore(0)
        self.worker = Worker(lambda: self.engine, max_backlog_tokens=max_backlog_tokens)
        self.worker.start(self.notices.release)

    def start(self, key: int, max_tokens: int = 100, seed: int = 0, model: str = "mock") -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=seed)
        self.worker.send(StartLease(LeaseRequest(key, model, (key,), params)))

    def allow_steps(self, count: int) -> None:
        self.engine.permits.release(count)

    def await_step(self) -> None:
        """Until the engine's thread is inside a step."""
        assert self.engine.steps_begun.acquire(timeout=TIMEOUT_S)

    def await_notice(self) -> None:
        assert self.notices.acquire(timeout=TIMEOUT_S)


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**changes: int) -> Bench:
        benches.append(Bench(**changes))
        return benches[-1]

    yield make
    for bench in benches:
        bench.allow_steps(1_000_000)
        assert bench.worker.close(TIMEOUT_S)


def test_steps_made_between_two_looks_are_merged_in_order(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    bench.start(1)
    bench.allow_steps(3)
    for _ in range(4):
        bench.await_step()
    bench.await_notice()
    output = bench.worker.take().output
    assert output.index == [0, 1, 2]
    assert output.token_id == mock_tokens((1,), seed=0, sample=0, start=0, stop=3, vocab_size=1000)
    assert not bench.notices.acquire(blocking=False), "one notice for all of it"
    assert bench.worker.num_steps == 3
    assert bench.worker.take().is_empty()
    bench.allow_steps(1)
    bench.await_notice()
    assert bench.worker.take().output.index == [3]


def test_a_refused_lease_is_told_and_the_others_go_on(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.start(1, seed=13)
    bench.await_notice()
    (refusal,) = bench.worker.take().answers
    assert isinstance(refusal, LeaseRefused)
    assert (refusal.key, refusal.reason, refusal.message) == (
        1,
        Reason.INVALID_REQUEST,
        "unlucky",
    )
    bench.start(2)
    bench.allow_steps(1)
    bench.await_notice()
    assert bench.worker.take().output.key == [2]


def test_an_abort_takes_effect_before_the_next_step(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.start(1)
    bench.start(2)
    bench.await_step()
    bench.worker.send(AbortLease(1))
    bench.allow_steps(2)
    bench.await_step()
    bench.await_step()
    output = bench.worker.take().output
    assert [key for key, index in zip(output.key, output.index, strict=True) if index] == [2]


def test_the_engine_pauses_when_nobody_takes(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_backlog_tokens=2)
    bench.start(1)
    bench.allow_steps(100)
    bench.await_step()
    bench.await_step()
    assert not bench.engine.steps_begun.acquire(timeout=0.05)
    bench.await_notice()
    assert bench.worker.take().output.index == [0, 1]
    bench.await_step()


def test_a_load_stops_the_steps_and_is_answered(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.start(1)
    bench.await_step()
    bench.worker.send(LoadModel("broken", ("other",)))
    bench.worker.send(LoadModel("broken", ("other",)))
    bench.allow_steps(1)
    assert bench.engine.loads_begun.acquire(timeout=TIMEOUT_S)
    assert bench.worker.num_steps == 1
    assert not bench.engine.steps_begun.acquire(timeout=0.05), "no step while it loads"
    bench.engine.load_permits.release(2)
    bench.await_step()
    bench.allow_steps(1)
    bench.await_step()
    work = bench.worker.take()
    assert work.answers == [ModelLoadFailed("broken", "it is broken")] * 2
    assert work.output.index == [0, 1]


def test_a_lease_runs_on_a_model_that_was_loaded(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.engine.load_permits.release()
    bench.worker.send(LoadModel("third", ("other",)))
    bench.await_notice()
    (answer,) = bench.worker.take().answers
    assert isinstance(answer, ModelLoaded)
    assert answer.model == "third"
    bench.start(1, model="third")
    bench.allow_steps(1)
    bench.await_notice()
    assert bench.worker.take().output.key == [1]


class WatchedEngine(MockEngine):
    """Remembers in which threads it lived."""

    def __init__(self) -> None:
        super().__init__(MockConfig(step_ms=0))
        self.threads = [threading.get_ident()]

    def step(self) -> StepOutput:
        self.threads.append(threading.get_ident())
        return super().step()

    def close(self) -> None:
        self.threads.append(threading.get_ident())


def test_an_engine_is_built_where_it_runs() -> None:
    """Else a torch engine has two teams of OpenMP threads, which make each other sleep."""
    worker = Worker(WatchedEngine, max_backlog_tokens=10)
    is_ready = threading.Event()
    worker.start(is_ready.set)
    worker.send(StartLease(LeaseRequest(1, "mock", (1,), SamplingParams(max_tokens=1))))
    assert is_ready.wait(TIMEOUT_S)
    assert worker.close(TIMEOUT_S)
    engine = worker.engine
    assert isinstance(engine, WatchedEngine)
    assert len(engine.threads) == 3
    assert len(set(engine.threads)) == 1
    assert threading.get_ident() not in engine.threads


def test_what_building_an_engine_raises_is_raised_here() -> None:
    def build() -> MockEngine:
        raise SystemExit("no such model")

    with pytest.raises(SystemExit, match="no such model"):
        Worker(build, max_backlog_tokens=10)


def test_a_fault_of_the_engine_ends_the_worker(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.engine.fault = ValueError("broken")
    bench.start(1)
    bench.allow_steps(1)
    bench.await_notice()
    with pytest.raises(EngineDiedError, match="broken"):
        bench.worker.take()


def test_close_waits_for_the_step_but_not_for_ever(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.start(1)
    bench.await_step()
    assert not bench.worker.close(0.01)
    bench.allow_steps(1)
    assert bench.worker.close(TIMEOUT_S)
    assert bench.engine.is_closed
