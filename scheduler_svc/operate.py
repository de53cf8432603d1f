"""What operators type: look at queue and fleet, drain an executor, take it back.

    python -m scheduler_svc.operate show
    python -m scheduler_svc.operate watch --rows 5
    python -m scheduler_svc.operate drain EXECUTOR
    python -m scheduler_svc.operate undrain EXECUTOR

It asks AdminService (protos/headway/v1/scheduler.proto), which says what every figure means.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence

import grpc.aio
from google.protobuf import duration_pb2

from headway.errors import from_rpc_error
from headway.server import connect
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from scheduler_svc import translate

_MAX_MESSAGE_BYTES = 64 << 20
_UNKNOWN = "-"
_EXECUTOR_HEADS = (
    *("executor", "state", "slots", "in doubt", "models", "kept for"),
    *("ended 1 h", "share", "used", "mean", "affinity"),
)
_MODEL_HEADS = ("model", "wait", "run", "homes", "granted", "tokens", "sessions", "loads")
_QUEUE_HEADS = (
    *("place", "model", "tenant", "band", "waited", "starts in"),
    *("priority", "tokens", "request"),
)


def _seconds(duration: duration_pb2.Duration) -> str:
    return f"{duration.ToMilliseconds() / 1_000:.1f} s"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Lines of columns as wide as what is in them; nothing without rows."""
    if not rows:
        return
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield ""
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(padded).rstrip()


def _executor(row: scheduler.ExecutorRow) -> list[object]:
    state = scheduler.ExecutorRow.State.Name(row.state).removeprefix("STATE_").lower()
    used = row.num_leased + row.num_in_doubt
    models = [
        f"{model}{' (runs)' if model in row.active_models else ''}" for model in row.resident_models
    ]
    if row.loading_model:
        models.append(f"{row.loading_model} (loading)")
    kept, stats = _UNKNOWN, row.stats
    if row.HasField("reservation"):
        for_whom = row.reservation
        kept = (
            f"{for_whom.model} ({for_whom.reason} since {_seconds(for_whom.age)}, "
            f"given up in {_seconds(for_whom.remaining)})"
        )
    return [
        *(row.executor_id, state, f"{used}/{row.num_slots}", row.num_in_doubt),
        *(", ".join(models) or _UNKNOWN, kept, stats.num_leases),
        _percent(stats.share) if stats.HasField("share") else _UNKNOWN,
        _percent(stats.utilisation) if stats.HasField("utilisation") else _UNKNOWN,
        _seconds(stats.mean_duration) if stats.HasField("mean_duration") else _UNKNOWN,
        _percent(stats.affinity) if stats.HasField("affinity") else _UNKNOWN,
    ]


def _waiting(row: scheduler.QueueRow) -> list[object]:
    status = row.status
    starts = _seconds(status.estimated_wait) if status.HasField("estimated_wait") else _UNKNOWN
    priority = f"{row.priority:.1f}" if row.HasField("priority") else _UNKNOWN
    return [
        *(f"{status.position + 1} of {status.depth}", row.model, row.tenant or _UNKNOWN, row.band),
        *(_seconds(row.waited), starts, priority, row.num_tokens, row.request_id),
    ]


def _model(row: scheduler.ModelRow) -> list[object]:
    totals = (row.num_requests, row.num_tokens, row.num_sessions)
    loads, failure = _UNKNOWN, row.load_failure
    if row.HasField("load_failure"):
        loads = f"failed on {failure.num_executors}: {failure.message}"
        if failure.HasField("refused_for"):
            loads += f"; refused for {_seconds(failure.refused_for)}"
    return [row.model, row.num_waiting, row.num_running, row.num_homes, *totals, loads]


def text_of(snapshot: scheduler.Snapshot) -> str:
    """Queue and fleet for a terminal."""
    wait = snapshot.queue_wait
    lines = [f"up {_seconds(snapshot.uptime)}, {snapshot.num_waiting} wait, "]
    lines[0] += f"{snapshot.num_running} run"
    if snapshot.HasField("queue_wait"):
        lines[0] += f"; waits of the last hour: mean {_seconds(wait.mean)}, "
        lines[0] += f"p10 {_seconds(wait.p10)}, p90 {_seconds(wait.p90)}"
    lines += _table(_EXECUTOR_HEADS, [_executor(row) for row in snapshot.executors])
    lines += _table(_MODEL_HEADS, [_model(row) for row in snapshot.models])
    lines += _table(_QUEUE_HEADS, [_waiting(row) for row in snapshot.queue])
    lines += _table(("decisions", ""), sorted(snapshot.decisions.items()))
    return "\n".join(lines)


async def answers(arguments: argparse.Namespace) -> AsyncGenerator[str]:
    """What was asked for. Raises AioRpcError."""
    async with connect(arguments.scheduler, max_message_bytes=_MAX_MESSAGE_BYTES) as channel:
        stub = scheduler_pb2_grpc.AdminServiceStub(channel)
        name, rows, timeout_s = arguments.executor, arguments.rows, arguments.timeout_s
        match arguments.command:
            case "drain":
                drain = scheduler.DrainExecutorRequest(executor_id=name)
                answer = await stub.DrainExecutor(drain, timeout=timeout_s)
                yield f"{name} takes nothing new; {answer.num_running} still run"
            case "undrain":
                undrain = scheduler.UndrainExecutorRequest(executor_id=name)
                await stub.UndrainExecutor(undrain, timeout=timeout_s)
                yield f"{name} takes new work"
            case "show":
                ask = scheduler.GetSnapshotRequest(max_rows=rows)
                yield text_of((await stub.GetSnapshot(ask, timeout=timeout_s)).snapshot)
            case "watch":
                interval = translate.duration(round(arguments.interval_s * 1_000))
                watch = scheduler.WatchSnapshotRequest(max_rows=rows, interval=interval)
                async for message in stub.WatchSnapshot(watch):
                    yield f"{text_of(message.snapshot)}\n{'=' * 40}"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: that of the process. What is wrong ends it with status 2."""
    parser = argparse.ArgumentParser(prog="python -m scheduler_svc.operate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("show", "watch", "drain", "undrain"))
    parser.add_argument("executor", nargs="?", help="whom to drain or undrain")
    parser.add_argument("--scheduler", default="127.0.0.1:50051", help="its host:port")
    parser.add_argument("--rows", type=int, default=20, help="most requests of the queue to show")
    parser.add_argument("--interval-s", type=float, default=1.0, help="between two looks of watch")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="longest wait for an answer")
    arguments = parser.parse_args(words)
    if (arguments.executor is not None) != (arguments.command in ("drain", "undrain")):
        parser.error("drain and undrain need an executor, show and watch take none")
    for name in ("rows", "interval_s", "timeout_s"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return arguments


async def _run(arguments: argparse.Namespace) -> None:
    async for text in answers(arguments):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and do it; what fails ends the process with one line and status 1."""
    arguments = parse(words)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_run(arguments))
    except grpc.aio.AioRpcError as error:
        sys.exit(f"{arguments.scheduler}: {from_rpc_error(error).message}")


if __name__ == "__main__":
    main()
