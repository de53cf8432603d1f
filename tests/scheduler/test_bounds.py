"""P1: what one hostile client or executor with a valid stream can make grow."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.admin import AdminService
from scheduler_svc.core import messages
from scheduler_svc.outputs import Output
from scheduler_svc.subscriptions import Feed
from tests.scheduler.inside import FakeContext, Inside, inside, submits, turn
from tests.scheduler.world import body, until_error, world


async def test_a_client_that_reads_no_answers_is_not_read_for_ever() -> None:
    async with inside(max_unread_answers=10) as own:
        client = await own.client()
        for handle in range(100):
            client.send(submits(handle, request=body(model="none")))
        await turn(1_000)
        assert client.num_taken < 20
        num_rejected = 0
        while num_rejected < 100:  # it goes on once somebody reads
            num_rejected += len((await client.read()).updates.rejected)


async def test_an_executor_that_reads_no_answers_is_not_read_for_ever() -> None:
    async with inside(max_unread_answers=10) as own:
        executor = await own.executor()
        ended = fleet.LeaseEnded(
            lease=fleet.LeaseRef(request_id="none", epoch=1, attempt=1),
            outcome=fleet.LeaseEnded.OUTCOME_RETURNED,
        )
        report = fleet.AttachRequest(report=fleet.ExecutorReport(ended=[ended]))
        for _ in range(100):
            executor.send(report)
            await turn()
        assert executor.num_taken < 20


async def test_positions_are_remembered_only_for_requests_that_wait() -> None:
    async with inside() as own:
        executor, client = await own.executor(), await own.client()
        client.send(submits(*range(4), wants_positions=True))  # all granted at once
        num_grants = 0
        while num_grants < 4:
            num_grants += len((await executor.read()).orders.grants)
        client.send(submits(*range(4, 104), wants_positions=True))
        num_accepted = 0
        while num_accepted < 104:
            num_accepted += len((await client.read()).updates.accepted)
        assert len(own.service._positions) == 100
        client.send(
            scheduler.OpenRequest(
                commands=scheduler.ClientCommands(
                    cancels=[scheduler.CancelCommand(handle=handle) for handle in range(4, 54)]
                )
            )
        )
        num_finished = 0
        while num_finished < 50:
            num_finished += len((await client.read()).updates.finished)
        assert len(own.service._positions) == 50
        client.context.end()
        assert len(own.service._positions) == 0


def take(feed: Feed, max_tokens: int = 100) -> scheduler.Updates:
    updates = scheduler.Updates()
    feed.take(updates, max_tokens)
    return updates


def test_a_slow_reader_gets_only_the_latest_position() -> None:
    feed = Feed(lambda: None)
    for position in (3, 2, 1):
        status = generation.QueueStatus(position=position)
        feed.tell_position(scheduler.Position(handle=7, status=status))
    assert [told.status.position for told in take(feed).positions] == [1]


def test_a_long_answer_does_not_hold_up_the_others() -> None:
    feed = Feed(lambda: None)
    outputs = [
        Output(str(n), num_samples=1, max_tokens=100, vocab_size=10, has_logprobs=False)
        for n in range(2)
    ]
    for handle, output in enumerate(outputs):
        output.token_ids[0].extend([1] * (100 if handle == 0 else 1))
        feed.subscribe(output, handle, ())
    handles = [set(take(feed, 10).frame.handle) for _ in range(2)]
    assert handles[0] == {0}
    assert 1 in handles[1]


def test_a_follower_of_a_failed_request_keeps_no_indexes() -> None:
    failed = Output("r", num_samples=0, max_tokens=0, vocab_size=0, has_logprobs=False)
    assert Feed(lambda: None).subscribe(failed, 1, [7] * 1_000).cursors == []


async def test_readers_of_one_finished_request_share_its_tokens() -> None:
    async with world() as own:
        executor, client = await own.pair()
        await client.submit()
        accepted = await client.accepted()
        await executor.run(await executor.grant(), [1, 2])
        await client.finished()
        results = own.process.runtime.results
        first = await results.replay(accepted.request_id, "t")
        assert await results.replay(accepted.request_id, "t") is first
        with pytest.raises(HeadwayError, match="No such request"):
            await results.replay(accepted.request_id, "x")


async def test_a_generate_that_nobody_reads_lets_go_of_its_request() -> None:
    async with inside(write_timeout_ms=500) as own:
        executor = await own.executor()
        call = await generate(own)
        grant = (await executor.read()).orders.grants[0]
        orders = asyncio.create_task(executor.read())
        await turn()
        own.cut_silent(400)
        await turn()
        assert not orders.done()
        own.cut_silent(200)
        assert list((await orders).orders.revokes) == [grant.lease]
        with pytest.raises(HeadwayError, match="took nothing"):
            await anext(call)


async def generate(own: Inside) -> AsyncIterator[scheduler.GenerateResponse]:
    call = own.service.Generate(scheduler.GenerateRequest(request=body()), FakeContext())  # type: ignore[arg-type]
    assert (await anext(call)).HasField("accepted")
    return call


async def test_a_cut_stream_counts_as_open_until_its_call_is_over() -> None:
    async with inside(write_timeout_ms=100, max_client_streams=1) as own:
        client = await own.client()
        own.cut_silent(200)
        with pytest.raises(HeadwayError, match="Too many calls"):
            await own.client()
        client.context.end()
        await own.client()


async def test_calls_of_operators_wait_for_room_in_the_mailbox() -> None:
    async with inside(max_mailbox_events=5) as own:
        await own.executor()
        admin = AdminService(own.runtime, own.settings)
        for _ in range(5):
            own.runtime.post(messages.Tick())
        request = scheduler.DrainExecutorRequest(executor_id="e1")
        call = asyncio.create_task(admin.DrainExecutor(request, FakeContext()))  # type: ignore[arg-type]
        own.runtime._mailbox.take = lambda max_events: []  # type: ignore[method-assign]
        await turn()
        assert len(own.runtime._mailbox._events) == 5
        call.cancel()


async def test_a_session_whose_handles_are_used_up_is_replaced() -> None:
    async with world() as own:
        executor, client = await own.pair()
        (link,) = own.process.runtime._actions.links.values()
        link._routes._next_handle = (1 << 32) - 1  # type: ignore[attr-defined]
        await client.submit(request=body(num_samples=2))
        await client.accepted()
        with pytest.raises(HeadwayError) as caught:
            await executor.grant()
        assert caught.value.reason is Reason.STALE_LEASE
        await executor.attach()
        assert (await executor.grant()).handle == 1


async def test_a_resume_whose_samples_have_no_handles_is_out_of_turn() -> None:
    async with world() as own:
        _, client = await own.pair()
        await client.submit(request=body(num_samples=2))
        accepted = await client.accepted()
        await client.resume((1 << 32) - 1, accepted.request_id)
        assert (await until_error(client.call)).reason is Reason.INVALID_REQUEST


async def test_what_a_replaced_session_says_is_not_heard() -> None:
    async with inside() as own:
        old, client = await own.executor(), await own.client()
        client.send(submits(0))
        grant = (await old.read()).orders.grants[0]
        # a write is under way that nobody takes: the old session cannot end
        await own.executor(num_slots=0)  # so that the request waits
        frame = generation.StepFrame(handle=[grant.handle], index=[0], token_id=[1])
        old.send(fleet.AttachRequest(report=fleet.ExecutorReport(frame=frame)))
        await turn()
        (live,) = own.runtime._requests.live.values()
        assert live.output.num_tokens == 0


async def test_a_generate_goes_on_after_a_full_frame() -> None:
    async with world(max_frame_tokens=2) as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        request = body(idempotency_key="k")
        call = client.stub.Generate(scheduler.GenerateRequest(request=request))
        await executor.run(await executor.grant(), [4, 5, 6, 7])
        async with asyncio.timeout(60):
            assert len([message async for message in call]) >= 4
        again = client.stub.Generate(scheduler.GenerateRequest(request=request))
        async with asyncio.timeout(60):
            frames = [message.frame async for message in again]
        assert [token for frame in frames for token in frame.token_id] == [4, 5, 6, 7]


async def test_a_request_whose_result_could_not_travel_is_refused() -> None:
    card = generation.ModelCard(name="tiny", vocab_size=10, max_context_tokens=1 << 30)
    async with world(max_message_bytes=1 << 20, max_orders_bytes=1 << 18) as own:
        _, client = await own.pair(models=[card])
        many = body(num_samples=64, sampling={"max_tokens": 4_096})
        await client.submit(handle=0, request=many)
        failure = (await client.rejected()).failure
        assert failure.reason == "INVALID_REQUEST"
        assert failure.message.startswith("sampling.max_tokens")


TOO_LONG = {
    "ends": fleet.AttachRequest(
        report=fleet.ExecutorReport(
            ended=[fleet.LeaseEnded(outcome=fleet.LeaseEnded.OUTCOME_RETURNED)] * 100_001
        )
    ),
    "handles": fleet.AttachRequest(heartbeat=fleet.ExecutorHeartbeat(handles=[1] * 100_001)),
    "an id": fleet.AttachRequest(
        report=fleet.ExecutorReport(
            ended=[
                fleet.LeaseEnded(
                    lease=fleet.LeaseRef(request_id="x" * 300),
                    outcome=fleet.LeaseEnded.OUTCOME_RETURNED,
                )
            ]
        )
    ),
}


@pytest.mark.parametrize("name", TOO_LONG)
async def test_messages_of_executors_are_bounded(name: str) -> None:
    async with inside() as own:
        executor = await own.executor()
        executor.send(TOO_LONG[name])
        with pytest.raises(HeadwayError) as caught:
            await executor.read()
        assert caught.value.reason is Reason.INVALID_REQUEST
