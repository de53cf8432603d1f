"""AdminService: what operators may see and do."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, TypeVar

import structlog
from google.protobuf import timestamp_pb2

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from scheduler_svc import translate
from scheduler_svc.core import answers, messages
from scheduler_svc.runtime import Runtime
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.streams import Context, Places

_MIN_WATCH_INTERVAL_MS = 100
_MAX_WATCH_INTERVAL_MS = 60_000
_DEFAULT_WATCH_INTERVAL_MS = 1_000
_MAX_PAUSE_S = 1.0  # between two snapshots
_ROWS_AT_ONCE = 256

T = TypeVar("T")

_STATES = {
    "attached": scheduler.ExecutorRow.STATE_ATTACHED,
    "lost": scheduler.ExecutorRow.STATE_LOST,
    "draining": scheduler.ExecutorRow.STATE_DRAINING,
}

_log = structlog.get_logger()


class Made(NamedTuple):
    """The last snapshot."""

    num_rows: int
    began_s: float
    snapshot: scheduler.Snapshot


class AdminService(scheduler_pb2_grpc.AdminServiceServicer):
    """The door for operators."""

    def __init__(self, runtime: Runtime, settings: SchedulerSettings) -> None:
        self._runtime = runtime
        self._settings = settings
        self._watchers = Places(settings.max_snapshot_watchers)
        self._making = asyncio.Lock()
        self._made: Made | None = None
        self._free_s = 0.0  # no snapshot is made before

    async def GetSnapshot(  # noqa: N802
        self, request: scheduler.GetSnapshotRequest, context: Context
    ) -> scheduler.GetSnapshotResponse:
        """See scheduler.proto."""
        return scheduler.GetSnapshotResponse(snapshot=await self._snapshot(request.max_rows))

    async def WatchSnapshot(  # noqa: N802
        self, request: scheduler.WatchSnapshotRequest, context: Context
    ) -> AsyncIterator[scheduler.WatchSnapshotResponse]:
        """See scheduler.proto."""
        interval_ms = _DEFAULT_WATCH_INTERVAL_MS
        if request.HasField("interval"):
            interval_ms = translate.duration_ms(
                request.interval,
                "interval",
                least=_MIN_WATCH_INTERVAL_MS,
                most=_MAX_WATCH_INTERVAL_MS,
            )
        self._watchers.take(context)
        while True:
            yield scheduler.WatchSnapshotResponse(snapshot=await self._snapshot(request.max_rows))
            await asyncio.sleep(interval_ms / 1_000)

    async def DrainExecutor(  # noqa: N802
        self, request: scheduler.DrainExecutorRequest, context: Context
    ) -> scheduler.DrainExecutorResponse:
        """See scheduler.proto."""
        await self._runtime.room()
        row = self._executor(request.executor_id)
        _log.info("drain.requested", executor_id=request.executor_id)
        self._runtime.post(messages.DrainExecutor(request.executor_id))
        return scheduler.DrainExecutorResponse(num_running=row.num_leased + row.num_in_doubt)

    async def UndrainExecutor(  # noqa: N802
        self, request: scheduler.UndrainExecutorRequest, context: Context
    ) -> scheduler.UndrainExecutorResponse:
        """See scheduler.proto."""
        await self._runtime.room()
        self._executor(request.executor_id)
        _log.info("drain.undone", executor_id=request.executor_id)
        self._runtime.post(messages.UndrainExecutor(request.executor_id))
        return scheduler.UndrainExecutorResponse()

    def _executor(self, executor_id: str) -> answers.ExecutorRow:
        row = self._runtime.executor(executor_id)
        if row is None:
            raise HeadwayError(Reason.INVALID_REQUEST, "No such executor.", field="executor_id")
        return row

    async def _snapshot(self, max_rows: int) -> scheduler.Snapshot:
        """One that is made after it was asked for. One at a time, and all of them together take at
        most ``snapshot_time_share`` of the time; who waits for the same rows gets the same one."""
        num_rows = min(
            max_rows or self._settings.default_snapshot_rows, self._settings.max_snapshot_rows
        )
        asked_s = time.monotonic()
        async with self._making:
            made = self._made
            if made is not None and made.num_rows == num_rows and made.began_s >= asked_s:
                return made.snapshot
            await asyncio.sleep(self._free_s - time.monotonic())
            began_s = time.monotonic()
            snapshot = await self._make(num_rows)
            self._made = Made(num_rows, began_s, snapshot)
            now_s = time.monotonic()
            pause_s = (now_s - began_s) * (1 / self._settings.snapshot_time_share - 1)
            self._free_s = now_s + min(pause_s, _MAX_PAUSE_S)
            return snapshot

    async def _make(self, num_rows: int) -> scheduler.Snapshot:
        found = await self._runtime.snapshot(num_rows)
        taken_at = timestamp_pb2.Timestamp()
        taken_at.FromNanoseconds(time.time_ns())
        snapshot = scheduler.Snapshot(
            taken_at=taken_at,
            epoch=self._runtime.epoch,
            num_waiting=found.num_waiting,
            num_running=found.num_running,
            decisions=found.decisions,
            queue_wait=queue_wait(found.queue_wait_ms),
            uptime=translate.duration(self._runtime.uptime_ms),
            sessions=scheduler.SessionTotals(
                num_tracked=found.sessions.num_tracked,
                num_hits=found.sessions.num_hits,
                num_misses=found.sessions.num_misses,
            ),
        )
        async for queued in _little_by_little(found.queue):
            snapshot.queue.append(queue_row(queued))
        async for executor in _little_by_little(found.executors):
            snapshot.executors.append(executor_row(executor))
        async for model in _little_by_little(found.models):
            snapshot.models.append(model_row(model))
        return snapshot


async def _little_by_little(rows: Sequence[T]) -> AsyncIterator[T]:
    """All of them, with chances for others in between."""
    for number, row in enumerate(rows):
        if number % _ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)
        yield row


def queue_row(row: answers.QueueRow) -> scheduler.QueueRow:
    """One waiting request."""
    return scheduler.QueueRow(
        request_id=row.request_id,
        model=row.model,
        tenant=row.tenant,
        band=row.band,
        waited=translate.duration(row.waited_ms),
        status=translate.status_to_proto(row.status, 0),
        priority=row.priority,
        session_id=row.session_id,
        num_tokens=min(row.num_tokens, (1 << 32) - 1),
    )


def model_row(row: answers.ModelRow) -> scheduler.ModelRow:
    """One known model."""
    return scheduler.ModelRow(
        model=row.model,
        num_requests=row.num_requests,
        num_tokens=row.num_tokens,
        num_sessions=row.num_sessions,
        num_waiting=row.num_waiting,
        num_running=row.num_running,
        num_homes=row.num_homes,
        load_failure=None if row.failure is None else load_failure(row.failure),
    )


def load_failure(row: answers.FailureRow) -> scheduler.LoadFailure:
    """Why a model is not loaded."""
    return scheduler.LoadFailure(
        message=row.message,
        num_executors=row.num_executors,
        refused_for=translate.duration(row.refused_ms) if row.refused_ms else None,
    )


def executor_row(row: answers.ExecutorRow) -> scheduler.ExecutorRow:
    """One executor."""
    return scheduler.ExecutorRow(
        executor_id=row.executor_id,
        state=_STATES[row.state],
        num_slots=row.num_slots,
        num_free=row.num_free,
        num_leased=row.num_leased,
        num_in_doubt=row.num_in_doubt,
        resident_models=row.resident_models,
        max_models=row.max_models,
        loading_model=row.loading_model or "",
        held_models=row.held_models,
        active_models=row.active_models,
        reservation=_reservation(row.reservation),
        stats=_stats(row.stats),
    )


def _reservation(row: answers.ReservationRow | None) -> scheduler.Reservation | None:
    if row is None:
        return None
    return scheduler.Reservation(
        model=row.model,
        reason=row.reason,
        age=translate.duration(row.age_ms),
        remaining=translate.duration(row.remaining_ms),
    )


def _stats(stats: answers.ExecutorStats | None) -> scheduler.ExecutorStats | None:
    if stats is None:
        return None
    mean_ms = stats.mean_duration_ms
    return scheduler.ExecutorStats(
        num_leases=stats.num_leases,
        share=stats.share,
        utilisation=stats.utilisation,
        mean_duration=None if mean_ms is None else translate.duration(round(mean_ms)),
        affinity=stats.affinity,
    )


def queue_wait(wait_ms: tuple[float, float, float, int] | None) -> scheduler.QueueWait | None:
    """Waits until the first grant, as in ``answers.Snapshot``."""
    if wait_ms is None:
        return None
    p10, mean, p90, num_samples = wait_ms
    return scheduler.QueueWait(
        p10=translate.duration(round(p10)),
        mean=translate.duration(round(mean)),
        p90=translate.duration(round(p90)),
        num_samples=num_samples,
    )
