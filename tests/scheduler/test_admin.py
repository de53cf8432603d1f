"""AdminService over real gRPC."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from headway.errors import from_rpc_error
from headway.reasons import Reason
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from scheduler_svc import admin, translate
from scheduler_svc.core import answers
from scheduler_svc.settings import SchedulerSettings
from tests.scheduler.inside import turn
from tests.scheduler.world import granted, world


async def test_a_snapshot_shows_queue_and_fleet() -> None:
    async with world() as own:
        stub = scheduler_pb2_grpc.AdminServiceStub(own.channel)
        _, client = await own.pair(num_slots=1)
        for handle in range(3):
            await client.submit(handle=handle)
            await client.accepted()
        answer = await stub.GetSnapshot(scheduler.GetSnapshotRequest(max_rows=1))
        shot = answer.snapshot
        assert (shot.num_waiting, shot.num_running) == (2, 1)
        assert [row.model for row in shot.queue] == ["tiny"]
        (row,) = shot.executors
        assert (row.num_slots, row.num_free, row.num_leased) == (1, 0, 1)
        assert row.state == scheduler.ExecutorRow.STATE_ATTACHED
        assert shot.epoch == own.process.runtime.epoch


async def test_a_watch_goes_on_until_its_caller_ends_it() -> None:
    async with world(max_snapshot_watchers=1) as own:
        stub = scheduler_pb2_grpc.AdminServiceStub(own.channel)
        request = scheduler.WatchSnapshotRequest(interval=translate.duration(100))
        call: Any = stub.WatchSnapshot(request)
        assert (await call.read()).HasField("snapshot")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.WatchSnapshot(request).read()
        assert from_rpc_error(caught.value).reason is Reason.QUOTA_EXCEEDED
        assert (await call.read()).HasField("snapshot")
        call.cancel()


class SlowRuntime:
    """Makes a snapshot when the test lets it."""

    epoch, uptime_ms = 1, 0

    def __init__(self) -> None:
        self.num_made = 0
        self.may_go_on = asyncio.Event()

    async def snapshot(self, max_rows: int) -> answers.Snapshot:
        self.num_made += 1
        await self.may_go_on.wait()
        return answers.Snapshot(0, 0, (), (), {"made": self.num_made})


async def test_who_asks_meanwhile_gets_the_next_one_and_all_of_them_the_same() -> None:
    runtime: Any = SlowRuntime()
    service = admin.AdminService(runtime, SchedulerSettings(snapshot_time_share=1))
    context: Any = None

    def ask(max_rows: int = 0) -> asyncio.Task[scheduler.GetSnapshotResponse]:
        request = scheduler.GetSnapshotRequest(max_rows=max_rows)
        return asyncio.create_task(service.GetSnapshot(request, context))

    first = ask()
    await turn()
    others = [ask() for _ in range(5)]
    more = ask(max_rows=7)
    await turn()
    runtime.may_go_on.set()
    shots = [(await asked).snapshot for asked in (first, *others, more)]
    assert [shot.decisions["made"] for shot in shots] == [1, *[2] * 5, 3]


async def test_drain_and_undrain() -> None:
    async with world() as own:
        stub = scheduler_pb2_grpc.AdminServiceStub(own.channel)
        executor, client = await own.pair()
        grant = await granted(executor, client)
        drained = await stub.DrainExecutor(scheduler.DrainExecutorRequest(executor_id="e1"))
        assert drained.num_running == 1
        await client.submit(handle=1)
        assert (await client.rejected()).failure.reason == "NO_CAPACITY"
        await executor.run(grant, [1])
        await client.finished()
        await stub.UndrainExecutor(scheduler.UndrainExecutorRequest(executor_id="e1"))
        await client.submit(handle=2)
        accepted = await client.accepted()
        assert (await executor.grant()).lease.request_id == accepted.request_id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DrainExecutor(scheduler.DrainExecutorRequest(executor_id="none"))
        assert from_rpc_error(caught.value).reason is Reason.INVALID_REQUEST


def test_a_row_shows_models_reservation_and_statistics() -> None:
    row = answers.ExecutorRow(
        executor_id="e",
        state="attached",
        num_slots=4,
        num_free=1,
        num_leased=2,
        num_in_doubt=1,
        resident_models=("a",),
        max_models=2,
        loading_model="b",
        held_models=("a",),
        active_models=("c",),
        reservation=answers.ReservationRow("b", "it waits", 10, 2_000),
        stats=answers.ExecutorStats(3, 0.5, 0.25, 1_500.4, None),
    )
    shown = admin.executor_row(row)
    assert shown.loading_model == "b"
    assert (list(shown.held_models), list(shown.active_models)) == (["a"], ["c"])
    assert (shown.reservation.model, shown.reservation.reason) == ("b", "it waits")
    assert shown.reservation.age.ToMilliseconds() == 10
    assert shown.reservation.remaining.ToMilliseconds() == 2_000
    assert (shown.stats.num_leases, shown.stats.share, shown.stats.utilisation) == (3, 0.5, 0.25)
    assert shown.stats.mean_duration.ToMilliseconds() == 1_500
    assert not shown.stats.HasField("affinity")


def test_what_is_not_known_is_unset() -> None:
    row = answers.ExecutorRow("e", "attached", 4, 4, 0, 0, (), 2)
    shown = admin.executor_row(row)
    assert shown.loading_model == ""
    assert not shown.HasField("reservation")
    assert not shown.HasField("stats")
    bare = answers.ExecutorStats(0, None, None, None, None)
    stats = admin.executor_row(replace(row, stats=bare)).stats
    assert stats == scheduler.ExecutorStats()
    status = answers.RequestStatus(False, 0, 1, None, 1_000)
    waiting = answers.QueueRow("r", "m", "t", 1, 5, status)
    assert not admin.queue_row(waiting).HasField("priority")
    ranked = admin.queue_row(replace(waiting, priority=0.0, session_id="s"))
    assert ranked.HasField("priority")
    assert ranked.session_id == "s"


def test_queue_waits() -> None:
    assert admin.queue_wait(None) is None
    shown = admin.queue_wait((1.4, 5.5, 9.0, 10))
    assert shown is not None
    assert shown.num_samples == 10
    percentiles = (shown.p10, shown.mean, shown.p90)
    assert [value.ToMilliseconds() for value in percentiles] == [1, 6, 9]
