"""AdminService over real gRPC."""

import grpc.aio
import pytest

from headway.errors import from_rpc_error
from headway.reasons import Reason
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from scheduler_svc import translate
from tests.scheduler.world import world


async def test_a_snapshot_shows_queue_and_fleet() -> None:
    async with world() as own:
        admin = scheduler_pb2_grpc.AdminServiceStub(own.channel)
        executor, client = own.executor(), own.client()
        await executor.attach(num_slots=1)
        await client.open()
        for handle in range(3):
            await client.submit(handle=handle)
            await client.accepted()
        answer = await admin.GetSnapshot(scheduler.GetSnapshotRequest(max_rows=1))
        shot = answer.snapshot
        assert (shot.num_waiting, shot.num_running) == (2, 1)
        assert [row.model for row in shot.queue] == ["tiny"]
        (row,) = shot.executors
        assert (row.num_slots, row.num_free, row.num_leased) == (1, 0, 1)
        assert row.state == scheduler.ExecutorRow.STATE_ATTACHED
        assert shot.epoch == own.process.runtime.epoch


async def test_a_watch_goes_on_until_its_caller_ends_it() -> None:
    async with world(max_snapshot_watchers=1) as own:
        admin = scheduler_pb2_grpc.AdminServiceStub(own.channel)
        request = scheduler.WatchSnapshotRequest(interval=translate.duration(100))
        call = admin.WatchSnapshot(request)
        assert (await call.read()).HasField("snapshot")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.WatchSnapshot(request).read()
        assert from_rpc_error(caught.value).reason is Reason.QUOTA_EXCEEDED
        assert (await call.read()).HasField("snapshot")
        call.cancel()


async def test_drain_and_undrain() -> None:
    async with world() as own:
        admin = scheduler_pb2_grpc.AdminServiceStub(own.channel)
        executor, client = own.executor(), own.client()
        await executor.attach()
        await client.open()
        await client.submit()
        await client.accepted()
        grant = await executor.grant()
        drained = await admin.DrainExecutor(scheduler.DrainExecutorRequest(executor_id="e1"))
        assert drained.num_running == 1
        await client.submit(handle=1)
        assert (await client.rejected()).failure.reason == "NO_CAPACITY"
        await executor.run(grant, [1])
        await client.finished()
        await admin.UndrainExecutor(scheduler.UndrainExecutorRequest(executor_id="e1"))
        await client.submit(handle=2)
        accepted = await client.accepted()
        assert (await executor.grant()).lease.request_id == accepted.request_id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.DrainExecutor(scheduler.DrainExecutorRequest(executor_id="none"))
        assert from_rpc_error(caught.value).reason is Reason.INVALID_REQUEST
