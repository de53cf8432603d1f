"""Five hundred clients die at once: nobody goes on working for them.

They live in one process, so that one kill -9 ends all of them at one instant. A witness streams
from the same executor: its tokens count the engine's steps.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from bench.stack import Stack
from headway.server import connect
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc

NUM_CLIENTS = 500
NUM_TOKENS = 10_000  # more than any of them lives to see
STEP_MS = 400
MAX_STEPS = 2
WITNESS = 1
CLIENTS = Path(__file__).parent / "doomed_clients.py"


class Witness:
    """One stream that lives on: how many steps the engine has made since it began."""

    def __init__(self, stub: scheduler_pb2_grpc.SchedulerServiceStub) -> None:
        self._stub = stub
        self._moved = asyncio.Condition()
        self.num_steps = 0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        await self.next_step()
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        request = generation_pb2.GenerationRequest(
            model="mock",
            prompt_token_ids=[9],
            sampling=generation_pb2.SamplingParams(max_tokens=NUM_TOKENS),
        )
        async for message in self._stub.Generate(scheduler_pb2.GenerateRequest(request=request)):
            async with self._moved:
                self.num_steps += len(message.frame.index)
                self._moved.notify_all()

    async def next_step(self) -> None:
        """Return just after the end of a step."""
        before = self.num_steps
        async with self._moved:
            await self._moved.wait_for(lambda: self.num_steps > before)


def start(num_slots: int) -> contextlib.AbstractContextManager[Stack]:
    return Stack.start(
        scheduler={"log_level": "debug", "generate_flush_ms": 0},
        executor={"max_num_seqs": num_slots, "mock_step_ms": STEP_MS},
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


def wait_for_grants(stack: Stack, number: int) -> None:
    stack.scheduler.wait_for("lease.granted", lambda _: count(stack, "lease.granted") >= number)


def count(stack: Stack, event: str) -> int:
    return sum(line["event"] == event for line in stack.scheduler.lines)


async def is_quiet(admin: scheduler_pb2_grpc.AdminServiceStub) -> bool:
    """Whether the witness is all that is left, in the queue and on the executor."""
    (snapshot, executor) = await look(admin)
    is_free = executor.num_free == executor.num_slots - WITNESS
    return is_free and (snapshot.num_running, snapshot.num_waiting) == (WITNESS, 0)


async def look(
    admin: scheduler_pb2_grpc.AdminServiceStub,
) -> tuple[scheduler_pb2.Snapshot, scheduler_pb2.ExecutorRow]:
    snapshot = (await admin.GetSnapshot(scheduler_pb2.GetSnapshotRequest())).snapshot
    (executor,) = snapshot.executors
    return snapshot, executor


def all_wait(stack: Stack, process: subprocess.Popen[str]) -> None:
    """The witness has the only seat."""
    admitted = NUM_CLIENTS + WITNESS
    stack.scheduler.wait_for(
        "request.admitted", lambda _: count(stack, "request.admitted") >= admitted
    )


def grants_begin(stack: Stack, process: subprocess.Popen[str]) -> None:
    """Some are granted, some are on their way there, some have not been read yet."""
    wait_for_grants(stack, NUM_CLIENTS // 5)


def all_stream(stack: Stack, process: subprocess.Popen[str]) -> None:
    wait_for_line(process, "streaming")


@pytest.mark.parametrize(
    ("num_slots", "stage"),
    [
        pytest.param(WITNESS, all_wait, id="queued"),
        pytest.param(NUM_CLIENTS + WITNESS, grants_begin, id="granted"),
        pytest.param(NUM_CLIENTS + WITNESS, all_stream, id="streaming"),
        pytest.param(NUM_CLIENTS // 2 + WITNESS, all_wait, id="half-queued-half-streaming"),
    ],
)
async def test_their_slots_are_free_within_two_steps(
    num_slots: int, stage: Callable[[Stack, subprocess.Popen[str]], None]
) -> None:
    with start(num_slots) as stack:
        async with connect(stack.scheduler_address, max_message_bytes=1 << 24) as channel:
            admin = scheduler_pb2_grpc.AdminServiceStub(channel)
            witness = Witness(scheduler_pb2_grpc.SchedulerServiceStub(channel))
            async with witness.watching():
                with doomed(stack) as process:
                    await asyncio.to_thread(stage, stack, process)
                    if stage is not grants_begin:  # there the instant is what it is about
                        await witness.next_step()
                    process.kill()
                    killed_at = witness.num_steps
                    while not await is_quiet(admin):
                        pass
                    num_steps = witness.num_steps - killed_at
                assert num_steps <= MAX_STEPS
                # whatever the gateway still had to read has been read and dropped by now
                await witness.next_step()
                await witness.next_step()
                assert await is_quiet(admin)
            await asyncio.to_thread(wait_for_ends, stack)
            snapshot, executor = await look(admin)
        assert snapshot.num_running == snapshot.num_waiting == 0
        assert executor.num_free == executor.num_slots == num_slots
        assert count(stack, "lease.granted") <= num_slots, "nobody was granted a dead one's seat"


def wait_for_ends(stack: Stack) -> None:
    """As many as were admitted, the witness too; each ended once."""
    admitted = count(stack, "request.admitted")
    ended = stack.scheduler.lines
    stack.scheduler.wait_for(
        "request.finished", lambda _: count(stack, "request.finished") >= admitted
    )
    finished = [line["request_id"] for line in ended if line["event"] == "request.finished"]
    assert len(finished) == len(set(finished)) == admitted
