"""A model that no executor can load, over real gRPC: what its clients and operators are told."""

from typing import Any

import grpc.aio

from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from tests.scheduler.world import CARD, Executor, world

WORDS = "tiny: ModelError('/models/tiny/model.safetensors: not what it was')"
SHOWN = "tiny: ModelError('model.safetensors: not what it was')"


async def fail_load(executor: Executor) -> None:
    """As it is ordered."""
    while not (orders := (await executor.read()).orders).loads:
        pass
    failure = generation.Failure(reason="INTERNAL", message=WORDS)
    state = fleet.ModelChange.STATE_FAILED
    change = fleet.ModelChange(model=orders.loads[0].model, state=state, failure=failure)
    await executor.send(report=fleet.ExecutorReport(models=[change]))


async def snapshot(channel: grpc.aio.Channel) -> scheduler.Snapshot:
    stub: Any = scheduler_pb2_grpc.AdminServiceStub(channel)
    answer: scheduler.GetSnapshotResponse = await stub.GetSnapshot(scheduler.GetSnapshotRequest())
    return answer.snapshot


async def test_clients_are_told_the_cause_without_the_machine_s_folders() -> None:
    async with world(max_load_failures=1, load_backoff_ms=60_000) as own:
        executor, client = await own.pair(models=(), absent=[CARD])
        await client.submit()
        await client.accepted()
        await fail_load(executor)
        failure = (await client.finished()).failure
        assert failure.reason == "NO_CAPACITY"
        assert failure.message == f"No executor can load the model 'tiny': {SHOWN}"
        assert 50 < failure.retry_after.ToSeconds() <= 60
        await client.submit(handle=1)
        assert (await client.rejected()).failure.message == failure.message
        [row] = (await snapshot(own.channel)).models
        assert (row.load_failure.message, row.load_failure.num_executors) == (SHOWN, 1)
        assert 50 < row.load_failure.refused_for.ToSeconds() <= 60


async def test_operators_see_a_failure_while_clients_still_wait() -> None:
    async with world(max_load_failures=2, load_backoff_ms=60_000) as own:
        executor, client = await own.pair(models=(), absent=[CARD])
        await client.submit()
        await client.accepted()
        await fail_load(executor)
        await executor.send(heartbeat=fleet.ExecutorHeartbeat())
        while not (row := (await snapshot(own.channel)).models[0]).HasField("load_failure"):
            pass
        assert not row.load_failure.HasField("refused_for")
        assert row.num_waiting == 1
