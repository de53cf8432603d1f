"""Models that share executors, with loads that take real seconds: rare ones start within a bound.

start <= arrival + aging + residual execution + load + dwell, and once more load + dwell +
execution for each rare model that goes first (ARCHITECTURE.md, no starvation).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from bench.stack import Stack
from executor_svc.settings import BUILTIN_MODEL
from headway.server import connect
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc

AGING_S = 2.0
HOLD_S = 0.2
SWITCH_TIME_SHARE = 0.5
LOAD_S = 2.0
NUM_SLOTS = 4
STEP_S = 0.01
NUM_TOKENS = 40
EXECUTION_S = NUM_TOKENS * STEP_S
DWELL_S = LOAD_S / SWITCH_TIME_SHARE
SWITCH_S = LOAD_S + DWELL_S + EXECUTION_S
# Two processes and this one share the cores: timers are late and messages take their time.
SLACK_S = 1.0

SCHEDULER = {
    "aging_equalization_ms": int(AGING_S * 1000),
    "model_hold_ms": int(HOLD_S * 1000),
    "switch_time_share": SWITCH_TIME_SHARE,
    "has_decision_log": True,
}
EXECUTOR = {
    "max_models": 1,
    "max_num_seqs": NUM_SLOTS,
    "mock_step_ms": STEP_S * 1000,
    "mock_load_ms": int(LOAD_S * 1000),
}

Stub = scheduler_pb2_grpc.SchedulerServiceStub


async def generate(stub: Stub, model: str) -> tuple[list[int], float]:
    """Run one request to its end: its tokens, and the seconds until its first grant."""
    request = generation_pb2.GenerationRequest(
        model=model,
        prompt_token_ids=range(20),
        sampling=generation_pb2.SamplingParams(max_tokens=NUM_TOKENS, seed=1, ignore_eos=True),
    )
    token_ids: list[int] = []
    async for message in stub.Generate(scheduler_pb2.GenerateRequest(request=request)):
        token_ids += message.frame.token_id
        if message.HasField("finished"):
            assert not message.finished.HasField("failure"), message.finished
            assert len(token_ids) == NUM_TOKENS
            assert message.finished.timing.num_attempts == 1
            return token_ids, message.finished.timing.queued.ToMilliseconds() / 1000
    raise AssertionError("a stream without an end")


async def ask(stub: Stub, model: str) -> float:
    """The wait of one request."""
    return (await generate(stub, model))[1]


class SteadyLoad:
    """More requests for one model than there are slots, all the time."""

    def __init__(self, stub: Stub, model: str, num_clients: int) -> None:
        self.waits_s: list[float] = []
        self._news = asyncio.Condition()
        self._stub, self._model, self._num_clients = stub, model, num_clients
        self._is_over = False

    async def _client(self) -> None:
        while not self._is_over:
            self.waits_s.append(await ask(self._stub, self._model))
            async with self._news:
                self._news.notify_all()

    async def go_on(self) -> None:
        """Until as many more requests have ended as there are clients."""
        goal = len(self.waits_s) + self._num_clients
        async with self._news:
            await self._news.wait_for(lambda: len(self.waits_s) >= goal)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """From when it is well under way; afterwards every request is awaited."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._num_clients):
                group.create_task(self._client())
            await self.go_on()
            yield
            self._is_over = True


@contextlib.asynccontextmanager
async def stack(num_executors: int, **settings: object) -> AsyncIterator[tuple[Stack, Stub]]:
    started = await asyncio.to_thread(
        Stack.start,
        executors=num_executors,
        scheduler=SCHEDULER,
        executor={**EXECUTOR, **settings},
        has_gateway=False,
    )
    try:
        address = started.scheduler_address
        async with connect(address, max_message_bytes=1 << 24) as channel:
            yield started, Stub(channel)
    finally:
        await asyncio.to_thread(started.close)


def count(stack: Stack, event: str) -> int:
    return sum(line["event"] == event for line in stack.scheduler.lines)


def show(
    capsys: pytest.CaptureFixture[str], title: str, waits_s: dict[str, list[float]], bound_s: float
) -> None:
    with capsys.disabled():
        print(f"\n{title}: bound {bound_s:.1f} s (and {SLACK_S:.0f} s of slack)")
        for model, values in waits_s.items():
            print(f"  {model}: " + " ".join(f"{value:.2f}" for value in values))


async def test_two_executors_three_models(capsys: pytest.CaptureFixture[str]) -> None:
    async with stack(2, mock_models="common,rare-1,rare-2") as (started, stub):
        load = SteadyLoad(stub, "common", 3 * NUM_SLOTS)
        waits_s: dict[str, list[float]] = {"rare-1": [], "rare-2": []}
        async with load.running():
            for _ in range(3):
                both = await asyncio.gather(*(ask(stub, model) for model in waits_s))
                for values, wait_s in zip(waits_s.values(), both, strict=True):
                    values.append(wait_s)
        num_loads = count(started, "model.ordered")
    # its own switch, and that of the other rare model if that one goes first
    bound_s = AGING_S + EXECUTION_S + SWITCH_S + SWITCH_S
    common = {"longest of common": [max(load.waits_s)]}
    show(capsys, f"two executors, {num_loads} loads", waits_s | common, bound_s)
    assert num_loads >= 2
    assert max(max(values) for values in waits_s.values()) <= bound_s + SLACK_S
    assert max(load.waits_s) <= bound_s + SLACK_S


async def test_a_sole_home_is_shared_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    async with stack(1, mock_models="common,rare") as (started, stub):
        load = SteadyLoad(stub, "common", 2 * NUM_SLOTS)
        waits_s: dict[str, list[float]] = {"rare": []}
        async with load.running():
            for _ in range(3):
                waits_s["rare"].append(await ask(stub, "rare"))
                await load.go_on()  # the common model is back
        num_loads = count(started, "model.ordered")
    bound_s = AGING_S + EXECUTION_S + SWITCH_S
    # who lost the device waits for its way back too
    common_bound_s = bound_s + SWITCH_S
    common = {"longest of common": [max(load.waits_s)]}
    show(capsys, f"a sole home, {num_loads} loads", waits_s | common, bound_s)
    assert num_loads == 6, "there and back again, each time"
    assert max(waits_s["rare"]) <= bound_s + SLACK_S
    assert max(load.waits_s) <= common_bound_s + SLACK_S


async def test_real_weights_come_and_go(capsys: pytest.CaptureFixture[str]) -> None:
    models = f"a={BUILTIN_MODEL},b={BUILTIN_MODEL}"
    async with stack(1, engine="torch", model=models) as (started, stub):
        answers = [await generate(stub, name) for name in ("a", "b", "a", "b")]
        loads_ms = [
            line["load_ms"]
            for line in started.scheduler.lines
            if line["event"] == "model.changed" and line["state"] == "resident"
        ]
    waits_s = {"each": [wait_s for _, wait_s in answers]}
    bound_s = HOLD_S + 2 * max(loads_ms) / 1000
    show(capsys, f"the built-in model under two names, loads of {loads_ms} ms", waits_s, bound_s)
    assert len(loads_ms) == 3
    assert len({tuple(token_ids) for token_ids, _ in answers}) == 1, "the same weights, each time"
    assert max(waits_s["each"]) <= bound_s + SLACK_S
