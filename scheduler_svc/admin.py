"""AdminService: what operators may see and do."""

import asyncio
import time
from collections.abc import AsyncIterator

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

_STATES = {
    "attached": scheduler.ExecutorRow.STATE_ATTACHED,
    "lost": scheduler.ExecutorRow.STATE_LOST,
    "draining": scheduler.ExecutorRow.STATE_DRAINING,
}

_log = structlog.get_logger()


class AdminService(scheduler_pb2_grpc.AdminServiceServicer):
    """The door for operators."""

    def __init__(self, runtime: Runtime, settings: SchedulerSettings) -> None:
        self._runtime = runtime
        self._settings = settings
        self._watchers = Places(settings.max_snapshot_watchers)

    async def GetSnapshot(  # noqa: N802
        self, request: scheduler.GetSnapshotRequest, context: Context
    ) -> scheduler.GetSnapshotResponse:
        """See scheduler.proto."""
        return scheduler.GetSnapshotResponse(snapshot=self._snapshot(request.max_rows))

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
            yield scheduler.WatchSnapshotResponse(snapshot=self._snapshot(request.max_rows))
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
        for row in self._runtime.snapshot(0).executors:
            if row.executor_id == executor_id:
                return row
        raise HeadwayError(Reason.INVALID_REQUEST, "No such executor.", field="executor_id")

    def _snapshot(self, max_rows: int) -> scheduler.Snapshot:
        num_rows = min(
            max_rows or self._settings.default_snapshot_rows, self._settings.max_snapshot_rows
        )
        found = self._runtime.snapshot(num_rows)
        taken_at = timestamp_pb2.Timestamp()
        taken_at.FromNanoseconds(time.time_ns())
        return scheduler.Snapshot(
            taken_at=taken_at,
            epoch=self._runtime.epoch,
            num_waiting=found.num_waiting,
            num_running=found.num_running,
            queue=[queue_row(row) for row in found.queue],
            executors=[executor_row(row) for row in found.executors],
            decisions=found.decisions,
            queue_wait=queue_wait(found.queue_wait_ms),
            uptime=translate.duration(self._runtime.uptime_ms),
            sessions=scheduler.SessionTotals(
                num_tracked=found.sessions.num_tracked,
                num_hits=found.sessions.num_hits,
                num_misses=found.sessions.num_misses,
            ),
            models=[model_row(row) for row in found.models],
        )


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
