"""A client's Open stream over real gRPC: submit, cancel, leave, resume, positions."""

import pytest

from headway.errors import HeadwayError
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc import translate
from tests.scheduler.world import body, granted, until_error, world


async def test_open_streams_a_request_from_submit_to_finished() -> None:
    async with world() as own:
        executor, client = await own.pair()
        await client.submit(handle=7)
        accepted = await client.accepted()
        assert accepted.handle == 7
        assert accepted.request_id.startswith("req_")
        grant = await executor.grant()
        assert grant.lease.request_id == accepted.request_id
        assert grant.request.sampling.HasField("seed")
        await executor.tokens(grant.handle, [10, 11])
        await client.until_token(2, handle=7)
        await executor.tokens(grant.handle, [12, 13], start=2, end=True)
        await executor.end(grant.lease, [4])
        finished = await client.finished()
        assert client.tokens == {7: [10, 11, 12, 13]}
        assert [(end.handle, end.num_tokens) for end in client.ends] == [(7, 4)]
        assert finished.handle == 7
        assert not finished.HasField("failure")
        assert finished.usage == generation.Usage(num_prompt_tokens=3, num_generated_tokens=4)
        orders = (await executor.read()).orders
        assert list(orders.acknowledged) == [grant.lease]


async def test_samples_have_consecutive_handles() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client, 5, num_samples=2)
        for sample in (0, 1):
            await executor.tokens(grant.handle + sample, [sample] * 2, end=True)
        await executor.end(grant.lease, [2, 2])
        await client.finished()
        assert client.tokens == {5: [0, 0], 6: [1, 1]}


async def test_a_bad_request_is_rejected_and_the_stream_lives() -> None:
    async with world(executor_grace_ms=0) as own:
        _, client = await own.pair()
        await client.submit(handle=1, request=body(prompt_token_ids=[]))
        rejected = await client.rejected()
        assert (rejected.handle, rejected.failure.reason) == (1, "INVALID_REQUEST")
        await client.submit(handle=2, request=body(model="other"))
        assert (await client.rejected()).failure.reason == "MODEL_NOT_FOUND"
        await client.submit(handle=3)
        assert (await client.accepted()).handle == 3


@pytest.mark.parametrize("handles", [(3, 3), (3, 2), ((1 << 32) - 1, 0)])
async def test_handles_must_increase_and_others_are_unharmed(handles: tuple[int, int]) -> None:
    async with world() as own:
        executor, bad, good = own.executor(), own.client(), own.client()
        await executor.attach()
        await bad.open()
        await good.open()
        await bad.submit(handle=handles[0])
        await bad.submit(handle=handles[1])
        assert "is not above the last one" in (await until_error(bad.call)).message
        await good.submit()
        assert await good.accepted()


async def test_cancel_command_is_answered_by_finished() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await executor.tokens(grant.handle, [1])
        await client.until_token(1)
        await client.command(cancels=[scheduler.CancelCommand(handle=0)])
        assert (await client.finished()).failure.reason == "CANCELLED"
        orders = (await executor.read()).orders
        assert list(orders.revokes) == [grant.lease]
        await executor.tokens(grant.handle, [2], start=1)  # was on its way: dropped
        await executor.end(grant.lease, [2], fleet.LeaseEnded.OUTCOME_REVOKED)
        await client.submit(handle=1)
        await client.accepted()
        await executor.run(await executor.grant(), [5])
        await client.finished()
        assert client.tokens[1] == [5]


async def test_submit_and_cancel_in_one_message() -> None:
    async with world() as own:
        _, client = await own.pair()
        await client.command(
            submits=[scheduler.SubmitCommand(handle=0, request=body())],
            cancels=[scheduler.CancelCommand(handle=0)],
        )
        assert (await client.finished()).failure.reason == "CANCELLED"


async def test_resume_goes_on_from_any_index_after_a_lost_stream() -> None:
    async with world() as own:
        executor, first, second = own.executor(), own.client(), own.client()
        await executor.attach()
        await first.open()
        await first.submit()
        accepted = await first.accepted()
        grant = await executor.grant()
        await executor.tokens(grant.handle, [10, 11, 12])
        await first.until_token(2)
        first.call.cancel()
        await second.open()
        second.tokens[9] = [10]
        await second.resume(9, accepted.request_id, [1])
        assert (await second.accepted()).request_id == accepted.request_id
        await executor.tokens(grant.handle, [13], start=3, end=True)
        await executor.end(grant.lease, [4])
        await second.finished()
        assert second.tokens == {9: [10, 11, 12, 13]}


async def test_resume_of_a_finished_request_replays_its_result() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client, sampling={"logprobs": True})
        await executor.tokens(grant.handle, [1, 2, 3], end=True, logprob=[-1.0, -2.0, -3.0])
        await executor.end(grant.lease, [3])
        finished = await client.finished()
        client.tokens[1] = [1]
        await client.resume(1, grant.lease.request_id, [1])
        replayed = await client.finished()
        assert client.tokens[1] == [1, 2, 3]
        assert replayed.usage == finished.usage
        await client.resume(2, grant.lease.request_id, [0, 0])
        assert (await client.rejected()).failure.reason == "INVALID_REQUEST"


async def test_resume_of_an_unknown_or_foreign_request_is_rejected() -> None:
    async with world() as own:
        _, client = await own.pair()
        await client.resume(1, "req_none")
        assert (await client.rejected()).failure.reason == "REQUEST_NOT_FOUND"
        await client.submit(handle=2, request=body(tenant="somebody else"))
        accepted = await client.accepted()
        await client.resume(3, accepted.request_id)
        assert (await client.rejected()).failure.reason == "REQUEST_NOT_FOUND"


async def test_an_attached_request_is_cancelled_after_the_resume_grace() -> None:
    async with world(resume_grace_ms=1) as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        client.call.cancel()
        assert list((await executor.read()).orders.revokes) == [grant.lease]


async def test_a_detached_request_outlives_its_stream() -> None:
    async with world(resume_grace_ms=0) as own:
        executor, client = await own.pair()
        await client.submit(detached=True)
        accepted = await client.accepted()
        client.call.cancel()
        await executor.run(await executor.grant(), [1])
        retrieved = await client.stub.Retrieve(
            scheduler.RetrieveRequest(
                request_id=accepted.request_id, tenant="t", wait=translate.duration(5_000)
            )
        )
        assert list(retrieved.result.samples[0].token_ids) == [1]


async def test_the_same_key_attaches_to_the_original_live_and_finished() -> None:
    async with world() as own:
        executor, client = await own.pair()
        request = body(idempotency_key="k")
        await client.submit(handle=0, request=request)
        accepted = await client.accepted()
        grant = await executor.grant()
        await executor.tokens(grant.handle, [1, 2])
        await client.until_token(2)
        await client.submit(handle=1, request=request)
        assert (await client.accepted()).request_id == accepted.request_id
        await client.until_token(2, handle=1)
        await executor.tokens(grant.handle, [3], start=2, end=True)
        await executor.end(grant.lease, [3])
        finished = await client.finished()
        while {0, 1} - client.tokens.keys() or client.tokens[0] != client.tokens[1]:
            await client.updates()
        assert client.tokens == {0: [1, 2, 3], 1: [1, 2, 3]}
        await client.submit(handle=2, request=request)
        assert (await client.accepted()).request_id == accepted.request_id
        await client.until_token(3, handle=2)
        await client.submit(handle=3, request=body(idempotency_key="k", session_id="other"))
        while True:
            updates = await client.updates()
            if updates.rejected:
                break
        assert updates.rejected[0].failure.reason == "REQUEST_ID_CONFLICT"
        assert finished.usage.num_generated_tokens == 3


async def test_positions_come_while_a_request_waits() -> None:
    async with world(position_interval_ms=10) as own:
        executor, client = await own.pair(num_slots=1)
        for handle in (0, 1, 2):
            await client.submit(handle=handle, wants_positions=True)
        grant = await executor.grant()
        num_accepted = 0
        while num_accepted < 3:  # before it runs: the last one starts with one ahead of it
            num_accepted += len((await client.updates()).accepted)
        await executor.run(grant, [1])
        while not client.positions:
            await client.updates()
        assert client.positions[0].handle == 2
        assert client.positions[0].status.state == generation.QueueStatus.STATE_WAITING


async def test_call_limits() -> None:
    async with world(max_client_streams=1, max_subscriptions_per_stream=1) as own:
        _, client = await own.pair()
        with pytest.raises(HeadwayError, match="Too many calls"):
            await own.client().open()
        await client.command(
            submits=[scheduler.SubmitCommand(handle=n, request=body()) for n in (0, 1)]
        )
        assert (await client.rejected()).failure.reason == "QUOTA_EXCEEDED"


async def test_a_request_that_everybody_left_is_cancelled_after_the_grace() -> None:
    async with world(resume_grace_ms=0) as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await client.command(cancels=[scheduler.CancelCommand(handle=0, leave=True)])
        assert list((await executor.read()).orders.revokes) == [grant.lease]


async def test_a_request_that_was_left_can_be_followed_again() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await client.command(cancels=[scheduler.CancelCommand(handle=0, leave=True)])
        await client.resume(1, grant.lease.request_id)
        await client.accepted()
        await executor.run(grant, [4, 5])
        finished = await client.finished()
        assert finished.handle == 1
        assert client.tokens == {1: [4, 5]}
