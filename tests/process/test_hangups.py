"""Five hundred clients die at once: nobody goes on working for them.

They live in one process, so that one kill -9 ends all of them at one instant. The executor stands
still from before that until gateway and scheduler are done with them, however long that takes them
here: what is counted are the steps that its engine makes with them afterwards.
"""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf import duration_pb2

from bench.stack import Process, Stack
from headway.server import connect
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc

NUM_CLIENTS = 500
NUM_TOKENS = 10_000  # more than any of them lives to see
STEP_MS = 800
MAX_STEPS = 2
WAIT_S = 60.0
STANDING = {  # nobody is given up for it
    "heartbeat_timeout_ms": 600_000,
    "revoke_timeout_ms": 600_000,
    "stall_timeout_ms": 600_000,
}
WITNESS = SQUATTER = 1
CLIENTS = Path(__file__).parent / "doomed_clients.py"


def generation(num_samples: int) -> generation_pb2.GenerationRequest:
    return generation_pb2.GenerationRequest(
        model="mock",
        prompt_token_ids=[9],
        num_samples=num_samples,
        sampling=generation_pb2.SamplingParams(max_tokens=NUM_TOKENS),
    )


class Witness:
    """One stream that lives on, a token with each of the engine's steps."""

    def __init__(self, stub: scheduler_pb2_grpc.SchedulerServiceStub) -> None:
        self._stub = stub
        self._moved = asyncio.Condition()
        self._num_tokens = 0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        await self.next_step()
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        request = scheduler_pb2.GenerateRequest(request=generation(num_samples=1))
        async for message in self._stub.Generate(request):
            async with self._moved:
                self._num_tokens += len(message.frame.index)
                self._moved.notify_all()

    async def next_step(self) -> None:
        """Return just after the end of a step."""
        before = self._num_tokens
        async with self._moved:
            await self._moved.wait_for(lambda: self._num_tokens > before)


def start(num_slots: int, step_log: Path) -> contextlib.AbstractContextManager[Stack]:
    logged = {"log_level": "debug", "generate_flush_ms": 0}
    return Stack.start(
        scheduler={**logged, **STANDING, "max_samples": NUM_CLIENTS},
        executor={"max_num_seqs": num_slots, "mock_step_ms": STEP_MS, "step_log": step_log},
        gateway={"submit_timeout_s": WAIT_S},
    )


@contextlib.contextmanager
def doomed(stack: Stack) -> Iterator[subprocess.Popen[str]]:
    port = stack.gateway_url.rpartition(":")[2]
    wishes = ["--port", port, "--clients", str(NUM_CLIENTS), "--tokens", str(NUM_TOKENS)]
    command = [sys.executable, str(CLIENTS), *wishes]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        if text.strip() == line:
            return
    raise AssertionError(f"the clients ended before they said {line!r}")


def wait_for_events(stack: Stack, event: str, number: int) -> None:
    stack.scheduler.wait_for(event, lambda _: count(stack, event) >= number)


def count(stack: Stack, event: str) -> int:
    return sum(line["event"] == event for line in stack.scheduler.lines)


@contextlib.contextmanager
def standing_still(process: Process) -> Iterator[None]:
    """For the length of a block."""
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


def steps_of(step_log: Path) -> list[dict[str, int]]:
    """What each step of the engine did so far."""
    return [json.loads(line) for line in step_log.read_text().splitlines()]


async def become_quiet(admin: scheduler_pb2_grpc.AdminServiceStub, num_left: int = WITNESS) -> None:
    """Return once so many are left, in the queue and on the executor."""
    async with asyncio.timeout(WAIT_S):
        async for snapshot in watch(admin):
            if is_quiet(snapshot, num_left):
                return


async def watch(
    admin: scheduler_pb2_grpc.AdminServiceStub,
) -> AsyncIterator[scheduler_pb2.Snapshot]:
    interval = duration_pb2.Duration()
    interval.FromMilliseconds(100)  # the least there is
    async for message in admin.WatchSnapshot(scheduler_pb2.WatchSnapshotRequest(interval=interval)):
        yield message.snapshot


def is_quiet(snapshot: scheduler_pb2.Snapshot, num_left: int) -> bool:
    (executor,) = snapshot.executors
    is_free = executor.num_free == executor.num_slots - num_left
    return is_free and (snapshot.num_running, snapshot.num_waiting) == (num_left, 0)


async def look(admin: scheduler_pb2_grpc.AdminServiceStub) -> scheduler_pb2.Snapshot:
    return (await admin.GetSnapshot(scheduler_pb2.GetSnapshotRequest())).snapshot


@dataclass(frozen=True, slots=True)
class Scene:
    """What the clients have come to when they are killed."""

    stack: Stack
    scheduler: scheduler_pb2_grpc.SchedulerServiceStub
    witness: Witness
    clients: subprocess.Popen[str]
    squatter_id: str

    async def arriving(self) -> None:
        """Some are granted, some are queued, some have not been read yet."""
        await asyncio.to_thread(
            wait_for_events, self.stack, "lease.granted", WITNESS + NUM_CLIENTS // 5
        )

    async def waiting(self) -> None:
        """All are accepted; as many as there are seats for run."""
        number = NUM_CLIENTS + WITNESS + (SQUATTER if self.squatter_id else 0)
        await asyncio.to_thread(wait_for_events, self.stack, "request.admitted", number)
        await self.witness.next_step()

    async def granted(self) -> None:
        """All seats were taken by one request, which has just gone: grants go out."""
        await self.waiting()
        request = scheduler_pb2.CancelRequest(request_id=self.squatter_id)
        await self.scheduler.Cancel(request)
        before = WITNESS + SQUATTER
        await asyncio.to_thread(wait_for_events, self.stack, "lease.granted", before + 1)

    async def streaming(self) -> None:
        """All have read a token."""
        await asyncio.to_thread(wait_for_line, self.clients, "streaming")
        await self.witness.next_step()


async def squat(stub: scheduler_pb2_grpc.SchedulerServiceStub) -> str:
    """Take all seats but the witness's; gives the request's id."""
    request = generation(num_samples=NUM_CLIENTS)
    return (await stub.Submit(scheduler_pb2.SubmitRequest(request=request))).request_id


@pytest.mark.parametrize(
    ("reach", "num_seats"),
    [
        pytest.param(Scene.arriving, NUM_CLIENTS, id="arriving"),
        pytest.param(Scene.waiting, 0, id="queued"),
        pytest.param(Scene.waiting, NUM_CLIENTS // 2, id="half-queued"),
        pytest.param(Scene.granted, NUM_CLIENTS, id="at-grant"),
        pytest.param(Scene.streaming, NUM_CLIENTS, id="streaming"),
    ],
)
async def test_their_slots_are_free_within_two_steps(
    tmp_path: Path, reach: Callable[[Scene], Awaitable[None]], num_seats: int
) -> None:
    step_log = tmp_path / "steps"
    with start(num_seats + WITNESS, step_log) as stack:
        async with connect(stack.scheduler_address, max_message_bytes=1 << 24) as channel:
            admin = scheduler_pb2_grpc.AdminServiceStub(channel)
            scheduler = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            witness = Witness(scheduler)
            async with witness.watching():
                squatter_id = await squat(scheduler) if reach is Scene.granted else ""
                with doomed(stack) as clients:
                    await reach(Scene(stack, scheduler, witness, clients, squatter_id))
                    with standing_still(stack.executors[0]):
                        clients.kill()
                        if reach is not Scene.arriving:  # who is still to be read is not known
                            await asyncio.to_thread(all_but_the_witness_end, stack)
                        num_steps = len(steps_of(step_log))
                    await become_quiet(admin)
                for _ in range(MAX_STEPS + 1):  # nothing comes back
                    await witness.next_step()
                assert is_quiet(await look(admin), WITNESS)
                later = steps_of(step_log)[num_steps:]
                num_wasted = sum(one["decoded"] > WITNESS or one["prefilled"] > 0 for one in later)
                assert num_wasted <= MAX_STEPS or reach is Scene.arriving
            await asyncio.to_thread(check_ends, stack)
            await become_quiet(admin, num_left=0)


def all_but_the_witness_end(stack: Stack) -> None:
    wait_for_events(stack, "request.finished", count(stack, "request.admitted") - WITNESS)


def check_ends(stack: Stack) -> None:
    """Whoever was admitted ended once, the witness too."""
    admitted = count(stack, "request.admitted")
    wait_for_events(stack, "request.finished", admitted)
    lines = stack.scheduler.lines
    ended = [line["request_id"] for line in lines if line["event"] == "request.finished"]
    assert len(ended) == len(set(ended)) == admitted
