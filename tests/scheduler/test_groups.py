"""WaitFinished: the logs of groups, and the call over real gRPC."""

import asyncio
from typing import Any

import grpc.aio
import pytest

from headway.errors import from_rpc_error
from headway.reasons import Reason
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from scheduler_svc.groups import Groups
from scheduler_svc.translate import duration
from tests.scheduler.world import body, world

G = ("t", "g")


def make(**limits: int) -> Groups:
    return Groups(**({"first": 1_000, "ttl_ms": 100, "max_groups": 10, "max_ends": 10} | limits))


def end(name: str) -> scheduler.FinishedRequest:
    return scheduler.FinishedRequest(request_id=name)


def names(groups: Groups, cursor: int = 0, now_ms: int = 0, group: tuple[str, str] = G) -> str:
    finished, _ = groups.since(group, cursor, now_ms)
    return "".join(one.request_id for one in finished)


def test_ends_are_told_once_in_order_and_by_group() -> None:
    groups = make()
    assert groups.since(G, 0, 0) == ([], 0)
    groups.add(G, end("a"), 0)
    groups.add(("t", "other"), end("x"), 0)
    groups.add(("u", "g"), end("y"), 0)
    groups.add(G, end("b"), 0)
    finished, cursor = groups.since(G, 0, 0)
    assert [one.request_id for one in finished] == ["a", "b"]
    assert groups.since(G, cursor, 0) == ([], cursor)
    groups.add(G, end("c"), 0)
    assert names(groups, cursor) == "c"
    assert names(groups) == "abc"


def test_ends_are_forgotten_with_their_results() -> None:
    groups = make()
    groups.add(G, end("a"), 0)
    groups.add(G, end("b"), 50)
    assert names(groups, now_ms=99) == "ab"
    assert names(groups, now_ms=100) == "b"
    assert names(groups, now_ms=150) == ""
    assert len(groups) == 0


def test_groups_and_ends_are_bounded() -> None:
    groups = make(max_groups=2, max_ends=2)
    for name in "abc":
        groups.add(G, end(name), 0)
    assert names(groups) == "bc"
    for other in ("g1", "g2"):
        groups.add(("t", other), end("x"), 0)
    assert len(groups) == 2
    assert names(groups) == ""


@pytest.mark.parametrize("first", [5_000, 10])
def test_a_cursor_from_an_earlier_start_misses_nothing(first: int) -> None:
    before = make()
    before.add(G, end("old"), 0)
    _, cursor = before.since(G, 0, 0)
    groups = make(first=first)  # the clock went on, or was set back
    groups.add(G, end("new"), 0)
    assert names(groups, cursor) == "new"


def test_whoever_watches_is_woken_once() -> None:
    groups, woken = make(), [0, 0]

    def wake(number: int) -> None:
        woken[number] += 1

    first, second = (lambda: wake(0)), (lambda: wake(1))
    groups.watch(G, first)
    groups.watch(G, second)
    groups.unwatch(G, second)
    groups.add(("t", "other"), end("x"), 0)
    assert woken == [0, 0]
    groups.add(G, end("a"), 0)
    groups.add(G, end("b"), 0)
    assert woken == [1, 0]
    groups.unwatch(G, first)


def ask(
    cursor: int = 0, wait_ms: int | None = None, **fields: Any
) -> scheduler.WaitFinishedRequest:
    values: Any = {"tenant": "t", "group": "g", "cursor": cursor} | fields
    wait = None if wait_ms is None else duration(wait_ms)
    return scheduler.WaitFinishedRequest(**values, wait=wait)


async def test_wait_finished_tells_each_end_and_its_size() -> None:
    async with world() as own:
        executor = own.executor()
        await executor.attach()
        stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
        nothing = await stub.WaitFinished(ask())
        assert not nothing.finished
        waiting = asyncio.ensure_future(stub.WaitFinished(ask(wait_ms=30_000)))
        ids = []
        for _ in range(2):
            request = scheduler.SubmitRequest(request=body(group="g"))
            ids.append((await stub.Submit(request)).request_id)
        await stub.Submit(scheduler.SubmitRequest(request=body(group="other")))
        grants = [await executor.grant() for _ in range(3)]
        await executor.run(grants[1], [1, 2, 3, 4])
        first = await asyncio.wait_for(waiting, 60)
        assert [one.request_id for one in first.finished] == [ids[1]]
        assert not first.finished[0].failed
        done = await stub.Retrieve(scheduler.RetrieveRequest(request_id=ids[1], tenant="t"))
        assert first.finished[0].num_bytes == done.result.ByteSize()
        await stub.Cancel(scheduler.CancelRequest(request_id=ids[0], tenant="t"))
        rest = await stub.WaitFinished(ask(first.cursor, wait_ms=30_000))
        assert [(one.request_id, one.failed) for one in rest.finished] == [(ids[0], True)]
        whole = await stub.WaitFinished(ask())
        assert len(whole.finished) == 2
        assert not (await stub.WaitFinished(ask(tenant="u"))).finished


async def test_wait_finished_waits_no_longer_than_asked_and_not_beyond_its_places() -> None:
    async with world(max_retrieve_waiters=0) as own:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
        assert not (await stub.WaitFinished(ask(wait_ms=40_000))).finished
    async with world() as own:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
        answer = await stub.WaitFinished(ask(cursor=77, wait_ms=1))
        assert (list(answer.finished), answer.cursor) == ([], 77)


def test_a_group_that_was_asked_for_never_looks_abandoned() -> None:
    """However many others were asked for since; too many are remembered as asked for too late."""
    groups = make(max_groups=2)
    for number in range(5):
        groups.since(("t", f"g{number}"), 0, 10 + number)
    assert [groups.asked_ms(("t", f"g{number}"), 99) for number in range(5)] == [12, 12, 12, 13, 14]
    assert groups.asked_ms(("t", ""), 99) == 0


@pytest.mark.parametrize("fields", [{"group": ""}, {"group": "x" * 300}, {"tenant": "\n"}])
async def test_wait_finished_refuses_bad_names(fields: dict[str, Any]) -> None:
    async with world() as own:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.WaitFinished(ask(**fields))
        assert from_rpc_error(refused.value).reason is Reason.INVALID_REQUEST
