"""FleetService over real gRPC: leases, failover, and whose a name is."""

import contextlib

import pytest

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from tests.scheduler.world import CARD, LENGTH, granted, held_lease, world


async def test_an_executor_that_breaks_is_adopted_where_it_stood() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await executor.tokens(grant.handle, [1, 2])
        await client.until_token(2)
        executor.call.cancel()
        held = held_lease(grant.lease, [3])
        welcome = await executor.attach(leases=[held])
        (adopt,) = welcome.adopts
        assert adopt.held == grant.lease
        assert adopt.lease.attempt > grant.lease.attempt
        assert list(adopt.next_index) == [2]
        await executor.tokens(adopt.handle, [3], start=2, end=True)
        await executor.end(adopt.lease, [3])
        await client.finished()
        assert client.tokens == {0: [1, 2, 3]}


async def test_a_lost_executor_hands_over_with_what_it_generated() -> None:
    async with world(executor_grace_ms=1) as own:
        first, client = await own.pair()
        grant = await granted(first, client)
        await first.tokens(grant.handle, [1, 2])
        await client.until_token(2)
        second = own.executor("e2")
        await second.attach()
        first.call.cancel()
        again = await second.grant()
        assert again.request == grant.request
        assert [list(sample.token_ids) for sample in again.generated] == [[1, 2]]
        await second.tokens(again.handle, [3], start=2, end=True)
        await second.end(again.lease, [3])
        await client.finished()
        assert client.tokens == {0: [1, 2, 3]}


async def test_a_lease_that_the_heartbeat_does_not_list_is_granted_again() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        beat = fleet.ExecutorHeartbeat(handles=[], last_handle=grant.handle - 1)
        await executor.send(heartbeat=beat)  # the grant had not arrived: nothing is lost
        beat.last_handle = grant.handle
        await executor.send(heartbeat=beat)
        again = await executor.grant()
        assert again.lease.request_id == grant.lease.request_id
        assert again.lease.attempt > grant.lease.attempt
        await executor.run(again, [1])
        await client.finished()


async def test_a_silent_executor_and_a_silent_client_are_cut() -> None:
    async with world(heartbeat_interval_ms=20, heartbeat_timeout_ms=60) as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        with pytest.raises(HeadwayError, match="silent"):
            await executor.read()
        await client.open()
        with pytest.raises(HeadwayError, match="silent"):
            await client.read()


async def test_an_end_is_acknowledged_again_when_it_is_repeated() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await executor.run(grant, [1])
        await client.finished()
        assert (await executor.read()).orders.acknowledged == [grant.lease]
        await executor.end(grant.lease, [1])
        assert (await executor.read()).orders.acknowledged == [grant.lease]


async def test_an_end_with_missing_tokens_is_our_fault_not_the_clients() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await executor.tokens(grant.handle, [1])
        await executor.end(grant.lease, [2])
        failure = (await client.finished()).failure
        assert failure.reason == "INTERNAL"


async def test_a_changed_token_ends_the_attempt_and_another_goes_on() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await executor.tokens(grant.handle, [1, 2])
        await executor.tokens(grant.handle, [2, 3], start=1)  # the same again: fine
        await executor.tokens(grant.handle, [9], start=0)
        orders = (await executor.read()).orders
        assert list(orders.revokes) == [grant.lease]
        again = orders.grants[0] if orders.grants else await executor.grant()
        assert [list(sample.token_ids) for sample in again.generated] == [[1, 2, 3]]
        await executor.tokens(again.handle, [4], start=3, end=True)
        await executor.end(again.lease, [4])
        await client.finished()
        assert client.tokens == {0: [1, 2, 3, 4]}


async def test_an_executors_failure_reaches_the_client() -> None:
    async with world() as own:
        executor, client = await own.pair()
        for number, (told, expected) in enumerate(
            [("INVALID_REQUEST", "INVALID_REQUEST"), ("NOT_LEADER", "INTERNAL")]
        ):
            grant = await granted(executor, client, handle=number)
            await executor.end(
                grant.lease,
                outcome=fleet.LeaseEnded.OUTCOME_FAILED,
                failure=generation.Failure(reason=told, message="no"),
            )
            assert (await client.finished()).failure.reason == expected


async def test_a_name_belongs_to_one_model() -> None:
    async with world() as own:
        first, second = own.executor("e1"), own.executor("e2")
        await first.attach()
        other = generation.ModelCard()
        other.CopyFrom(CARD)
        other.weights_digest = "other"
        with pytest.raises(HeadwayError, match="another model of that name"):
            await second.attach(models=[other])
        first.call.cancel()
        while True:  # until the scheduler saw it
            with contextlib.suppress(HeadwayError):
                await second.attach(models=[other])
                break


async def test_a_twin_is_refused_while_the_first_is_attached() -> None:
    """Both would go on taking the other's place, and lose what either runs each time."""
    async with world() as own:
        first, client = await own.pair()
        twin = own.executor()
        await client.submit()
        grant = await first.grant()
        with pytest.raises(HeadwayError, match="Another process") as caught:
            await twin.attach(incarnation="2")
        assert caught.value.reason is Reason.STALE_LEASE  # which is tried again
        await first.run(grant, [1, 2, 3, 4])
        assert not (await client.finished()).HasField("failure")
        first.call.cancel()
        while True:  # until the scheduler saw it
            with contextlib.suppress(HeadwayError):
                await twin.attach(incarnation="2")
                break
        await client.submit(handle=1)
        await twin.run(await twin.grant(), [1, 2, 3, 4])


async def test_a_second_stream_of_the_same_executor_replaces_the_first() -> None:
    async with world() as own:
        old, new = own.executor(), own.executor()
        await old.attach()
        await new.attach()
        with pytest.raises(HeadwayError) as caught:
            await old.read()
        assert caught.value.reason is Reason.STALE_LEASE


async def test_sequence_ends_may_be_repeated_but_not_changed() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client, num_samples=2)
        await executor.tokens(grant.handle, [1], end=True)
        await executor.tokens(grant.handle, [], start=1, end=True)
        end = generation.SequenceEnd(
            handle=grant.handle, num_tokens=1, reason=generation.FINISH_REASON_STOP
        )
        frame = generation.StepFrame(ends=[end])
        await executor.send(report=fleet.ExecutorReport(frame=frame))
        again = await executor.grant()
        assert again.generated[0].end.reason == LENGTH
        assert not again.generated[1].HasField("end")
