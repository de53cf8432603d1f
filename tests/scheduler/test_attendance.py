"""Futures that nobody asks for, and the note that travels with a request."""

from typing import Any

from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.attendance import Attendance
from scheduler_svc.translate import duration
from tests.scheduler.inside import FakeContext, Inside, inside, turn
from tests.scheduler.world import body

ABANDON_MS = 60_000


def test_what_is_asked_for_is_looked_at_again_later() -> None:
    attendance = Attendance()
    attendance.watch("a", 100, 0)
    attendance.watch("b", 100, 0)
    asked = {"a": 40, "b": 0}
    assert attendance.next_due_ms == 100
    assert attendance.abandoned(asked.get, 99) == []
    assert attendance.abandoned(asked.get, 100) == ["b"]
    assert attendance.next_due_ms == 140
    assert attendance.abandoned(asked.get, 140) == ["a"]
    assert attendance.next_due_ms is None


def test_what_is_over_is_not_watched_any_more() -> None:
    attendance = Attendance()
    attendance.watch("a", 100, 0)
    assert attendance.abandoned(lambda _: None, 100) == []
    assert len(attendance) == 0


async def submitted(own: Inside, **fields: Any) -> str:
    fields = {"abandon_after": duration(ABANDON_MS), **fields}
    request = scheduler.SubmitRequest(request=body(**fields))
    response = await own.service.Submit(request, FakeContext())  # type: ignore[arg-type]
    return response.request_id


async def retrieved(own: Inside, request_id: str) -> scheduler.RetrieveResponse:
    request = scheduler.RetrieveRequest(request_id=request_id, tenant=body().tenant)
    return await own.service.Retrieve(request, FakeContext())  # type: ignore[arg-type]


async def passes(own: Inside, ms: int) -> None:
    """Time passes, and an executor's heartbeat wakes the runtime."""
    own.now_ms += ms
    own.runtime.cancel_abandoned()
    await turn()


def is_cancelled(response: scheduler.RetrieveResponse) -> bool:
    return response.result.failure.reason == "CANCELLED"


async def test_a_future_that_nobody_asks_for_is_cancelled() -> None:
    async with inside() as own:
        await own.executor(num_slots=0)
        left, polled, for_ever = (
            await submitted(own),
            await submitted(own),
            await submitted(own, abandon_after=None),
        )
        await passes(own, ABANDON_MS - 1)
        assert (await retrieved(own, polled)).HasField("pending")
        await passes(own, 1)
        assert is_cancelled(await retrieved(own, left))
        assert (await retrieved(own, polled)).HasField("pending")
        assert (await retrieved(own, for_ever)).HasField("pending")


async def test_whoever_waits_for_the_group_asks_for_all_in_it() -> None:
    async with inside() as own:
        await own.executor(num_slots=0)
        mine = await submitted(own, group="g")
        other = await submitted(own, group="h")
        await passes(own, ABANDON_MS - 1)
        request = scheduler.WaitFinishedRequest(tenant=body().tenant, group="g")
        await own.service.WaitFinished(request, FakeContext())  # type: ignore[arg-type]
        await passes(own, 1)
        assert (await retrieved(own, mine)).HasField("pending")
        assert is_cancelled(await retrieved(own, other))


async def test_a_note_comes_back_with_the_result_and_never_reaches_an_executor() -> None:
    async with inside() as own:
        executor = await own.executor()
        request_id = await submitted(own, note=b"mine", sampling={"max_tokens": 1})
        (grant,) = (await executor.read()).orders.grants
        assert not grant.request.note
        frame = generation.StepFrame(
            handle=[grant.handle],
            index=[0],
            token_id=[1],
            ends=[
                generation.SequenceEnd(
                    handle=grant.handle,
                    num_tokens=1,
                    reason=generation.FINISH_REASON_LENGTH,
                )
            ],
        )
        ended = fleet.LeaseEnded(
            lease=grant.lease, outcome=fleet.LeaseEnded.OUTCOME_COMPLETED, num_tokens=[1]
        )
        report = fleet.ExecutorReport(frame=frame, ended=[ended])
        executor.send(fleet.AttachRequest(report=report))
        await turn(50)
        assert (await retrieved(own, request_id)).result.note == b"mine"
