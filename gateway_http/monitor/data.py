"""What /monitor/data says: the scheduler's snapshot under the names that monitors know.

Shares are whole percents, utilisation has one decimal, durations are seconds. Null is what nobody
knows yet; ``last_poll_age`` always is null, as executors are not polled: they dial the scheduler.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from operator import attrgetter
from typing import TypeVar

import msgspec
from google.protobuf import duration_pb2

from headway.v1 import scheduler_pb2

_ID_CHARS = 12
_SESSION_CHARS = 8
_LIVE = (scheduler_pb2.ExecutorRow.STATE_ATTACHED, scheduler_pb2.ExecutorRow.STATE_DRAINING)
_STATE_PREFIX = "STATE_"
_ROWS_AT_ONCE = 128  # under a millisecond of work

T = TypeVar("T")
Row = TypeVar("Row")


class AcceptTime(msgspec.Struct):
    """Waits until the first grant over the last hour, in seconds."""

    p10: float
    mean: float
    p90: float
    sample_count: int


class Reserved(msgspec.Struct):
    """For which model an executor is drained, and why."""

    model: str
    reason: str
    age_s: float
    remaining_s: float


class Backend(msgspec.Struct):
    """One executor; ``active_models`` have running work, ``models`` are on the device."""

    url: str
    live: bool
    state: str
    active_models: list[str]
    models: list[str]
    loading_model: str | None
    max_models: int
    reservation: Reserved | None
    slots_acquired: int
    slots_total: int
    last_poll_age: float | None
    stat_requests: int
    stat_share_pct: int | None
    stat_utilization_pct: float | None
    stat_avg_duration_s: float | None
    stat_affinity: int | None


class Waiting(msgspec.Struct):
    """One request of the queue, by position; ids are cut short."""

    request_id: str
    model: str
    tenant: str
    session_id: str
    age_s: float
    estimated_tokens: int
    priority: float | None
    band: int
    position: int
    eta_s: float | None


class LoadFailure(msgspec.Struct):
    """Why a model is not loaded; ``refused_s`` is set while nobody can and requests are refused."""

    message: str
    executors: int
    refused_s: float | None


class ModelStats(msgspec.Struct):
    """One model: granted since the scheduler's start, what waits and runs, and where."""

    requests: int
    estimated_tokens: int
    tracked_sessions: int
    waiting: int
    running: int
    homes: int
    load_failure: LoadFailure | None


class MonitorData(msgspec.Struct):
    """Queue and fleet at one instant."""

    uptime: float
    total_requests: int
    queue_depth: int
    running: int
    session_count: int
    live_backend_count: int
    session_hits: int
    session_misses: int
    session_hit_rate: int | None
    accept_time: AcceptTime | None
    backends: list[Backend]
    queue: list[Waiting]
    model_stats: dict[str, ModelStats]
    decisions: dict[str, int]


async def in_parts(rows: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """All of them, in order, with a chance for others before each part."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        await asyncio.sleep(0)
        yield rows[start : start + _ROWS_AT_ONCE]


async def view(snapshot: scheduler_pb2.Snapshot) -> MonitorData:
    """The snapshot as monitors know it; streams go on while a large one is made."""
    backends = await _rows(snapshot.executors, _backend)
    queue = await _rows(snapshot.queue, _waiting)
    models = await _rows(snapshot.models, _model)
    sessions = snapshot.sessions
    num_hinted = sessions.num_hits + sessions.num_misses
    return MonitorData(
        uptime=seconds(snapshot.uptime),
        total_requests=snapshot.decisions.get("admitted", 0),
        queue_depth=snapshot.num_waiting,
        running=snapshot.num_running,
        session_count=sessions.num_tracked,
        live_backend_count=sum(backend.live for backend in backends),
        session_hits=sessions.num_hits,
        session_misses=sessions.num_misses,
        session_hit_rate=_percent(sessions.num_hits / num_hinted) if num_hinted else None,
        accept_time=_accept_time(snapshot),
        backends=backends,
        queue=sorted(queue, key=attrgetter("position")),
        model_stats=dict(models),
        decisions=dict(sorted(snapshot.decisions.items())),
    )


async def _rows(rows: Sequence[T], made: Callable[[T], Row]) -> list[Row]:
    return [made(row) async for part in in_parts(rows) for row in part]


def _backend(row: scheduler_pb2.ExecutorRow) -> Backend:
    stats = row.stats
    has_mean = stats.HasField("mean_duration")
    state = scheduler_pb2.ExecutorRow.State.Name(row.state)
    return Backend(
        url=row.executor_id,
        live=row.state in _LIVE,
        state=state.removeprefix(_STATE_PREFIX).lower(),
        active_models=sorted(row.active_models),
        models=sorted(row.resident_models),
        loading_model=row.loading_model or None,
        max_models=row.max_models,
        reservation=_reserved(row.reservation) if row.HasField("reservation") else None,
        slots_acquired=row.num_leased + row.num_in_doubt,
        slots_total=row.num_slots,
        last_poll_age=None,
        stat_requests=stats.num_leases,
        stat_share_pct=_percent(stats.share) if stats.HasField("share") else None,
        stat_utilization_pct=round(100 * stats.utilisation, 1)
        if stats.HasField("utilisation")
        else None,
        stat_avg_duration_s=round(seconds(stats.mean_duration), 2) if has_mean else None,
        stat_affinity=_percent(stats.affinity) if stats.HasField("affinity") else None,
    )


def _reserved(row: scheduler_pb2.Reservation) -> Reserved:
    return Reserved(row.model, row.reason, seconds(row.age), seconds(row.remaining))


def _waiting(row: scheduler_pb2.QueueRow) -> Waiting:
    status = row.status
    has_priority = row.HasField("priority") and math.isfinite(row.priority)
    return Waiting(
        request_id=row.request_id[:_ID_CHARS],
        model=row.model,
        tenant=row.tenant,
        session_id=row.session_id[:_SESSION_CHARS],
        age_s=seconds(row.waited),
        estimated_tokens=row.num_tokens,
        priority=round(row.priority, 3) if has_priority else None,
        band=row.band,
        position=status.position,
        eta_s=seconds(status.estimated_wait) if status.HasField("estimated_wait") else None,
    )


def _model(row: scheduler_pb2.ModelRow) -> tuple[str, ModelStats]:
    return row.model, ModelStats(
        requests=row.num_requests,
        estimated_tokens=row.num_tokens,
        tracked_sessions=row.num_sessions,
        waiting=row.num_waiting,
        running=row.num_running,
        homes=row.num_homes,
        load_failure=_load_failure(row.load_failure) if row.HasField("load_failure") else None,
    )


def _load_failure(row: scheduler_pb2.LoadFailure) -> LoadFailure:
    refused_s = seconds(row.refused_for) if row.HasField("refused_for") else None
    return LoadFailure(row.message, row.num_executors, refused_s)


def _accept_time(snapshot: scheduler_pb2.Snapshot) -> AcceptTime | None:
    if not snapshot.HasField("queue_wait"):
        return None
    wait = snapshot.queue_wait
    return AcceptTime(seconds(wait.p10), seconds(wait.mean), seconds(wait.p90), wait.num_samples)


def _percent(share: float) -> int:
    return round(100 * share)


def seconds(duration: duration_pb2.Duration) -> float:
    """To the millisecond."""
    return duration.ToMilliseconds() / 1000
