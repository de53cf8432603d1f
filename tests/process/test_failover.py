"""kill -9 of an executor: every request ends once, on the executor that is left."""

import asyncio
from collections.abc import Iterator

import pytest

from bench.stack import Stack
from executor_svc.mock_engine import MockConfig
from executor_svc.mock_formulas import mock_tokens
from headway.server import connect
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc

NUM_REQUESTS = 16
NUM_TOKENS = 500  # seconds of work: nobody is done while the last of them begins
MODEL = "mock"


@pytest.fixture
def stack() -> Iterator[Stack]:
    settings = {"max_num_seqs": NUM_REQUESTS, "mock_step_ms": 10}
    with Stack.start(executors=2, executor=settings) as stack:
        yield stack


def request_number(number: int) -> generation_pb2.GenerationRequest:
    return generation_pb2.GenerationRequest(
        model=MODEL,
        prompt_token_ids=range(number, number + 20),
        sampling=generation_pb2.SamplingParams(max_tokens=NUM_TOKENS, seed=number),
    )


async def follow(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, number: int, progress: asyncio.Semaphore
) -> tuple[list[int], list[int], list[scheduler_pb2.Finished]]:
    """Everything that one stream said; releases ``progress`` once it is well under way."""
    indexes: list[int] = []
    tokens: list[int] = []
    ends: list[scheduler_pb2.Finished] = []
    request = scheduler_pb2.GenerateRequest(request=request_number(number))
    has_told = False
    async for message in stub.Generate(request):
        indexes.extend(message.frame.index)
        tokens.extend(message.frame.token_id)
        if message.HasField("finished"):
            ends.append(message.finished)
        if not has_told and len(indexes) >= 20:
            has_told = True
            progress.release()
    return indexes, tokens, ends


async def test_sixteen_running_requests_survive_kill_9(stack: Stack) -> None:
    progress = asyncio.Semaphore(0)
    async with connect(stack.scheduler_address, max_message_bytes=1 << 24) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        admin = scheduler_pb2_grpc.AdminServiceStub(channel)
        streams = [
            asyncio.create_task(follow(stub, number, progress)) for number in range(NUM_REQUESTS)
        ]
        for _ in range(NUM_REQUESTS):
            await progress.acquire()
        snapshot = (await admin.GetSnapshot(scheduler_pb2.GetSnapshotRequest())).snapshot
        leased = {row.executor_id: row.num_leased for row in snapshot.executors}
        assert sum(leased.values()) == NUM_REQUESTS
        assert all(leased.values()), "both executors run some of them"
        victim, survivor = stack.executors
        victim.kill()
        results = await asyncio.gather(*streams)
        after = (await admin.GetSnapshot(scheduler_pb2.GetSnapshotRequest())).snapshot

    for number, (indexes, tokens, ends) in enumerate(results):
        assert indexes == list(range(NUM_TOKENS)), "no token lost, none twice"
        prompt = list(range(number, number + 20))
        assert tokens == mock_tokens(
            prompt,
            seed=number,
            sample=0,
            start=0,
            stop=NUM_TOKENS,
            vocab_size=MockConfig().vocab_size,
        )
        assert len(ends) == 1
        assert not ends[0].HasField("failure"), ends[0]
    attempts = [ends[0].timing.num_attempts for _, _, ends in results]
    moved = leased["executor-1"]
    assert sorted(attempts) == [1] * (NUM_REQUESTS - moved) + [2] * moved
    assert after.num_running == after.num_waiting == 0
    rows = {row.executor_id: row for row in after.executors}
    assert rows["executor-2"].num_free == rows["executor-2"].num_slots
    assert survivor.stop() == 0
    assert stack.scheduler.stop() == 0
    finished = [line for line in stack.scheduler.lines if line["event"] == "request.finished"]
    assert len(finished) == NUM_REQUESTS, "each request ended once"
