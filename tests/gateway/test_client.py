"""Generations of the scheduler client: real gRPC, broken in every way."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gateway_http import connection
from gateway_http.client import Finish, Positioned, SampleEnded, SchedulerClient, Tokens
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.conftest import settings_for, work
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import failure, leave_alone


async def test_a_generation_from_acceptance_to_usage(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    sampling = generation_pb2.SamplingParams(logprobs=True)
    async with client.generate(work(num_samples=2, sampling=sampling)) as generation:
        accepted = await generation.accepted()
        assert (accepted.request_id, accepted.status.position) == ("run-0", 3)
        events = [event async for event in generation]
    reply = [*tiny_model.encode(tiny_model.REPLY), tiny_model.eos_id()]
    for sample in range(2):
        tokens = [one for one in events if isinstance(one, Tokens) and one.sample == sample]
        assert [token for one in tokens for token in one.token_ids] == reply
        assert tokens[0].logprobs[:2] == [-0.5, -1.5]
    assert sum(isinstance(event, SampleEnded) for event in events) == 2
    last = events[-1]
    assert isinstance(last, Finish)
    assert last.error is None
    assert last.usage.num_prompt_tokens == 3
    assert last.usage.num_generated_tokens == 2 * len(reply)
    assert client.num_inflight == 0


async def test_positions_come_while_waiting(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    async with client.generate(work(), wants_positions=True) as generation:
        await generation.accepted()
        first = await anext(generation)
        assert isinstance(first, Positioned)
        assert first.status.position == 3
        scheduler.tell_positions(1)
        second = await anext(generation)
        assert isinstance(second, Positioned)
        assert second.status.position == 1


async def test_a_refusal_carries_reason_and_retry_after(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.refusal = failure(Reason.QUEUE_FULL, 2500)
    with pytest.raises(HeadwayError) as caught:
        await client.submit(work())
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_ms == 2500
    assert client.num_inflight == 0


async def test_a_broken_stream_continues_without_loss(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    async with client.generate(work()) as generation:
        await generation.accepted()
        run = await scheduler.run()
        run.emit([10, 11])
        scheduler.publish()
        first = await anext(generation)
        assert first == Tokens(0, 0, [10, 11], [])
        scheduler.drop_connections()
        await scheduler.until(lambda: bool(scheduler.resumes))
        assert scheduler.resumes == [("run-0", (2,))]
        run.emit([12])
        run.end()
        run.finish()
        scheduler.publish()
        events = [event async for event in generation]
    assert events[0] == Tokens(0, 2, [12], [])
    assert isinstance(events[-1], Finish)
    assert events[-1].error is None


async def test_a_silent_scheduler_is_replaced(scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    scheduler.heartbeat_timeout_ms = 1_000
    client = SchedulerClient(settings_for(scheduler))
    async with client.running(), client.generate(work()) as generation:
        await generation.accepted()
        scheduler.heartbeat_timeout_ms = 60_000
        scheduler.mute()
        await scheduler.until(lambda: bool(scheduler.resumes))
        run = await scheduler.run()
        run.emit([7])
        scheduler.publish()
        assert await anext(generation) == Tokens(0, 0, [7], [])


async def test_a_scheduler_is_not_lost_because_we_stood_still(
    scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.heartbeat_timeout_ms = 1_000
    client = SchedulerClient(settings_for(scheduler))
    clock = asyncio.get_running_loop().time
    async with client.running():
        await client.list_models()
        monkeypatch.setattr(connection, "_now", lambda: clock() + 3_600)
        before = scheduler.num_heartbeats
        await scheduler.until(lambda: scheduler.num_heartbeats > before + 10)
    assert scheduler.num_opens == 1


async def test_we_are_heard_of_while_we_only_listen(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    async with client.generate(work()) as generation:
        await generation.accepted()
        run = await scheduler.run()

        before = scheduler.num_heartbeats
        while scheduler.num_heartbeats < before + 2:  # what is read wakes the writer up each time
            run.emit([7])
            scheduler.publish()
            assert isinstance(await anext(generation), Tokens)
    assert scheduler.num_opens == 1


async def test_an_unanswered_submit_is_repeated_under_its_key(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    generation = client.generate(work(num_samples=2))
    await scheduler.until(lambda: scheduler.num_opens == 1)
    scheduler.drop_connections()
    await generation.accepted()
    await scheduler.until(lambda: scheduler.num_opens == 2)
    assert len(scheduler.runs) == 1
    generation.cancel()


@contextlib.asynccontextmanager
async def hasty_client(scheduler: ScriptedScheduler) -> AsyncIterator[SchedulerClient]:
    """One that is connected, and waits a second for an acceptance."""
    client = SchedulerClient(settings_for(scheduler, submit_timeout_s=1))
    async with client.running():
        await client.list_models()
        yield client


async def test_a_future_that_is_answered_too_late_is_found_again_by_its_key(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    async with hasty_client(scheduler) as hasty:
        scheduler.is_deaf = True
        with pytest.raises(HeadwayError) as caught:
            await hasty.submit(work(idempotency_key="k"))
        assert caught.value.reason is Reason.NO_CAPACITY
        assert hasty.num_inflight == 0
        scheduler.hear()
        accepted = await client.submit(work(idempotency_key="k"))
    assert accepted.request_id == scheduler.runs[0].request_id
    assert (len(scheduler.runs), scheduler.cancelled) == (1, [])


@pytest.mark.parametrize("is_kept", [False, True])
async def test_work_that_is_kept_is_not_cancelled_by_whatever_happens_here(
    client: SchedulerClient, scheduler: ScriptedScheduler, is_kept: bool
) -> None:
    """A late answer, a reader that leaves, a gateway that shuts down."""
    scheduler.script = leave_alone
    async with hasty_client(scheduler) as hasty:
        scheduler.is_deaf = True
        late = hasty.generate(work(idempotency_key="late"), is_kept=is_kept)
        with pytest.raises(HeadwayError):
            await late.accepted()
        scheduler.hear()
        async with client.generate(work(idempotency_key="left"), is_kept=is_kept) as left:
            await left.accepted()
        last = client.generate(work(idempotency_key="last"), is_kept=is_kept)
        await last.accepted()
        client.fail_all()
        # what comes after it on the same stream shows that it was all that came before it
        for one in (client, hasty):
            await one.submit(work(idempotency_key="end"))
        await scheduler.until(lambda: len(scheduler.cancelled) == (0 if is_kept else 3))
    assert len(scheduler.runs) == 4


async def test_leaving_early_cancels(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    async with client.generate(work()) as generation:
        await generation.accepted()
    await scheduler.until(lambda: scheduler.cancelled == ["run-0"])


async def test_a_cancel_survives_a_broken_stream(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = leave_alone
    generation = client.generate(work())
    await generation.accepted()
    scheduler.drop_connections()
    generation.cancel()
    await scheduler.until(lambda: scheduler.cancelled == ["run-0"])


async def test_accepted_work_is_given_up_when_no_scheduler_returns(
    scheduler: ScriptedScheduler,
) -> None:
    scheduler.script = leave_alone
    client = SchedulerClient(settings_for(scheduler, reconnect_timeout_s=0.1))
    async with client.running():
        await client.list_models()  # its clock runs from the start, too
        generation = client.generate(work())
        await generation.accepted()
        await scheduler.stop()
        last = [event async for event in generation][-1]
        assert isinstance(last, Finish)
        assert last.error is not None
        assert last.error.reason is Reason.NO_CAPACITY
