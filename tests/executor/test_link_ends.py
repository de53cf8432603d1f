"""How an executor's link ends: refused, drained, or without its engine; and when it tries again."""

import pytest

from executor_svc.core.engine import StepOutput
from executor_svc.stream import AttachRefusedError
from executor_svc.worker import EngineDiedError
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.server import Server
from headway.v1 import fleet_pb2 as fleet
from tests.executor.linked import LONG, Executor, grant, ref
from tests.executor.scripted_scheduler import ScriptedScheduler


async def test_it_tries_the_next_address(scheduler: ScriptedScheduler) -> None:
    executor = Executor(f"127.0.0.1:1,{scheduler.address}")
    await scheduler.welcomed()
    await executor.close()


@pytest.mark.parametrize("reason", [Reason.INVALID_REQUEST, Reason.PERMISSION_DENIED])
async def test_a_final_refusal_ends_it(
    scheduler: ScriptedScheduler, executor: Executor, reason: Reason
) -> None:
    attachment = await scheduler.attached()
    attachment.close(HeadwayError(reason, "no"))
    with pytest.raises(AttachRefusedError, match=reason):
        await executor.ended()


async def test_a_server_that_knows_no_executors_ends_it() -> None:
    """Such as a scheduler of another contract."""
    server = Server(max_message_bytes=1 << 20, max_concurrent_streams=10, has_reflection=False)
    port = await server.start("127.0.0.1:0")
    executor = Executor(f"127.0.0.1:{port}")
    with pytest.raises(AttachRefusedError, match="Method not found"):
        await executor.ended()
    await server.stop(0)


async def test_other_refusals_are_tried_again(
    scheduler: ScriptedScheduler, executor: Executor
) -> None:
    for reason in (Reason.NOT_LEADER, Reason.INTERNAL):
        attachment = await scheduler.attached()
        attachment.close(HeadwayError(reason, "not now"))
    await scheduler.welcomed()


async def test_no_welcome_in_time_is_a_failure(scheduler: ScriptedScheduler) -> None:
    executor = Executor(scheduler.address, attach_timeout_ms=100)
    await scheduler.attached()
    await scheduler.attached()
    await executor.close()


async def test_drain_lets_work_finish(scheduler: ScriptedScheduler, executor: Executor) -> None:
    attachment = await scheduler.welcomed()
    attachment.order(grants=[grant("a", 1, 50)])
    await attachment.until_tokens(1, 1)
    executor.link.drain()
    attachment.order(grants=[grant("late", 2)])
    assert (await attachment.until_ended("late")).outcome == fleet.LeaseEnded.OUTCOME_RETURNED
    assert (await attachment.until_ended("a")).outcome == fleet.LeaseEnded.OUTCOME_COMPLETED
    attachment.order(acknowledged=[ref("a")])
    await attachment.next("close")
    attachment.close()
    await executor.ended()


async def test_drain_hands_back_what_does_not_finish(scheduler: ScriptedScheduler) -> None:
    executor = Executor(scheduler.address, drain_timeout_ms=20)
    attachment = await scheduler.welcomed()
    attachment.order(grants=[grant("a", 1, LONG)])
    await attachment.until_tokens(1, 1)
    executor.link.drain()
    report = await attachment.next("report")
    while not report.HasField("capacity"):
        report = await attachment.next("report")
    assert report.capacity.num_slots == 0
    ended = await attachment.until_ended("a")
    assert ended.outcome == fleet.LeaseEnded.OUTCOME_RETURNED
    assert list(ended.num_tokens) == [len(attachment.tokens[1])]
    attachment.order(acknowledged=[ref("a")])
    await attachment.next("close")
    attachment.close()
    await executor.ended()
    await executor.close()


async def test_drain_without_answer_ends_all_the_same(scheduler: ScriptedScheduler) -> None:
    executor = Executor(scheduler.address, drain_timeout_ms=20, flush_timeout_ms=20)
    attachment = await scheduler.welcomed()
    attachment.order(grants=[grant("a", 1, LONG)])
    await attachment.until_tokens(1, 1)
    executor.link.drain()
    await executor.ended()
    await executor.close()


async def test_drain_without_a_scheduler_ends_at_once(scheduler: ScriptedScheduler) -> None:
    executor = Executor(scheduler.address)
    await scheduler.attached()  # and never welcomed
    executor.link.drain()
    await executor.ended()
    await executor.close()


async def test_an_engine_that_dies_ends_it_without_a_word(
    scheduler: ScriptedScheduler, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> StepOutput:
        raise ValueError("broken")

    monkeypatch.setattr(executor.engine, "step", step)
    attachment = await scheduler.welcomed()
    attachment.order(grants=[grant("a", 1)])
    with pytest.raises(EngineDiedError, match="broken") as caught:
        await executor.ended()
    assert isinstance(caught.value.__cause__, ValueError), "the log is to show the engine's own"
    assert not attachment.ended
