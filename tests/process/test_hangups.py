"""Five hundred clients die at once: nobody goes on working for them.

They live in one process, so that one kill -9 ends all of them at one instant. A witness streams
from the same executor: its tokens count the engine's steps.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf import duration_pb2

from bench.stack import Stack
from headway.server import connect
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc

NUM_CLIENTS = 500
NUM_TOKENS = 10_000  # more than any of them lives to see
STEP_MS = 800
MAX_STEPS = 2
EVENTUALLY = 50  # steps; a seat that leaked stays away for ever
WAIT_S = 60.0
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
        request = scheduler_pb2.GenerateRequest(request=generation(num_samples=1))
        async for message in self._stub.Generate(request):
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
        scheduler={"log_level": "debug", "generate_flush_ms": 0, "max_samples": NUM_CLIENTS},
        executor={"max_num_seqs": num_slots, "mock_step_ms": STEP_MS},
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


async def become_quiet(
    admin: scheduler_pb2_grpc.AdminServiceStub, witness: Witness, max_steps: int
) -> None:
    """Within so many steps the witness is all that is left, in the queue and on the executor."""
    killed_at = witness.num_steps
    async for snapshot in watch(admin):
        num_steps = witness.num_steps - killed_at
        assert num_steps <= max_steps, snapshot
        if is_quiet(snapshot):
            return


async def become_empty(admin: scheduler_pb2_grpc.AdminServiceStub) -> None:
    """Return once nobody is left; a slot comes back with the engine's next step."""
    async with asyncio.timeout(WAIT_S):
        async for snapshot in watch(admin):
            if is_quiet(snapshot, num_left=0):
                return


async def watch(
    admin: scheduler_pb2_grpc.AdminServiceStub,
) -> AsyncIterator[scheduler_pb2.Snapshot]:
    interval = duration_pb2.Duration()
    interval.FromMilliseconds(100)  # the least there is
    async for message in admin.WatchSnapshot(scheduler_pb2.WatchSnapshotRequest(interval=interval)):
        yield message.snapshot


def is_quiet(snapshot: scheduler_pb2.Snapshot, num_left: int = WITNESS) -> bool:
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
    ("reach", "num_seats", "max_steps"),
    [
        pytest.param(Scene.arriving, NUM_CLIENTS, EVENTUALLY, id="arriving"),
        pytest.param(Scene.waiting, 0, MAX_STEPS, id="queued"),
        pytest.param(Scene.waiting, NUM_CLIENTS // 2, MAX_STEPS, id="half-queued"),
        pytest.param(Scene.granted, NUM_CLIENTS, MAX_STEPS, id="at-grant"),
        pytest.param(Scene.streaming, NUM_CLIENTS, MAX_STEPS, id="streaming"),
    ],
)
async def test_their_slots_are_free_within_two_steps(
    reach: Callable[[Scene], Awaitable[None]], num_seats: int, max_steps: int
) -> None:
    with start(num_seats + WITNESS) as stack:
        async with connect(stack.scheduler_address, max_message_bytes=1 << 24) as channel:
            admin = scheduler_pb2_grpc.AdminServiceStub(channel)
            scheduler = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            witness = Witness(scheduler)
            async with witness.watching():
                squatter_id = await squat(scheduler) if reach is Scene.granted else ""
                with doomed(stack) as clients:
                    await reach(Scene(stack, scheduler, witness, clients, squatter_id))
                    clients.kill()
                    await become_quiet(admin, witness, max_steps)
                for _ in range(MAX_STEPS):  # nothing comes back
                    await witness.next_step()
                assert is_quiet(await look(admin))
            await asyncio.to_thread(check_ends, stack)
            await become_empty(admin)


def check_ends(stack: Stack) -> None:
    """Whoever was admitted ended once, the witness too."""
    admitted = count(stack, "request.admitted")
    wait_for_events(stack, "request.finished", admitted)
    lines = stack.scheduler.lines
    ended = [line["request_id"] for line in lines if line["event"] == "request.finished"]
    assert len(ended) == len(set(ended)) == admitted
