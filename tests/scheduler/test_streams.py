"""What a stream's writer puts into one message, and when it speaks by itself."""

import asyncio

import pytest

from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from tests.scheduler.inside import inside, submits, turn


def completed(grant: fleet.Grant) -> fleet.AttachRequest:
    """The only token of a lease, and its end."""
    end = generation.SequenceEnd(
        handle=grant.handle, num_tokens=1, reason=generation.FINISH_REASON_LENGTH
    )
    frame = generation.StepFrame(handle=[grant.handle], index=[0], token_id=[1], ends=[end])
    ended = fleet.LeaseEnded(
        lease=grant.lease, outcome=fleet.LeaseEnded.OUTCOME_COMPLETED, num_tokens=[1]
    )
    return fleet.AttachRequest(report=fleet.ExecutorReport(frame=frame, ended=[ended]))


async def test_the_end_of_a_request_travels_with_its_last_tokens() -> None:
    async with inside() as own:
        executor, client = await own.executor(), await own.client()
        client.send(submits(0))
        assert (await client.read()).updates.accepted
        executor.send(completed((await executor.read()).orders.grants[0]))
        updates = (await client.read()).updates
        assert list(updates.frame.token_id) == [1]
        assert [finished.handle for finished in updates.finished] == [0]


async def test_the_acceptance_of_what_starts_at_once_travels_with_its_first_tokens() -> None:
    async with inside(accept_linger_ms=1_000) as own:
        executor, client = await own.executor(), await own.client()
        read = asyncio.create_task(client.read())
        client.send(submits(0))
        grant = (await executor.read()).orders.grants[0]
        await turn()
        assert not read.done()
        executor.send(completed(grant))
        updates = (await read).updates
        (accepted,) = updates.accepted
        assert accepted.request_id == grant.lease.request_id
        assert not accepted.HasField("status"), "nobody asked"
        assert list(updates.frame.token_id) == [1]
        assert [finished.handle for finished in updates.finished] == [0]


async def test_an_acceptance_does_not_wait_for_ever() -> None:
    async with inside(accept_linger_ms=0) as own:
        _, client = await own.executor(), await own.client()
        read = asyncio.create_task(client.read())
        await turn()
        client.send(submits(0))
        assert (await read).updates.accepted


async def test_an_acceptance_of_what_has_to_wait_does_not_linger() -> None:
    async with inside(accept_linger_ms=1_000) as own:
        _, client = await own.executor(num_slots=1), await own.client()
        read = asyncio.create_task(client.read())
        client.send(submits(0))
        await turn()
        assert not read.done()
        client.send(submits(1))
        accepted = (await read).updates.accepted
        assert [one.handle for one in accepted] == [0, 1]


@pytest.mark.parametrize("wish", ["detached", "wants_positions"])
async def test_an_acceptance_that_is_asked_for_its_status_does_not_linger(wish: str) -> None:
    async with inside(accept_linger_ms=1_000) as own:
        _, client = await own.executor(), await own.client()
        read = asyncio.create_task(client.read())
        await turn()
        client.send(submits(0, **{wish: True}))
        (accepted,) = (await read).updates.accepted
        assert accepted.status.state == generation.QueueStatus.STATE_RUNNING


async def test_an_acknowledgement_waits_for_a_grant_to_travel_with() -> None:
    async with inside(ack_linger_ms=1_000) as own:
        executor, client = await own.executor(), await own.client()
        client.send(submits(0))
        first = (await executor.read()).orders.grants[0]
        orders = asyncio.create_task(executor.read())
        await turn()
        executor.send(completed(first))
        while not (await client.read()).updates.finished:
            pass
        await turn()
        assert not orders.done()
        client.send(submits(1))
        assert list((await orders).orders.acknowledged) == [first.lease]
        assert len(orders.result().orders.grants) == 1


async def test_an_acknowledgement_does_not_wait_for_ever() -> None:
    async with inside(ack_linger_ms=0) as own:
        executor, client = await own.executor(), await own.client()
        client.send(submits(0))
        first = (await executor.read()).orders.grants[0]
        executor.send(completed(first))
        assert list((await executor.read()).orders.acknowledged) == [first.lease]


async def test_a_stream_that_is_silent_for_half_an_interval_shows_that_we_live() -> None:
    async with inside(heartbeat_interval_ms=1_000) as own:
        client = await own.client()
        message = asyncio.create_task(anext(client._responses))
        own.cut_silent(499)
        await turn()
        assert not message.done()
        own.cut_silent(1)
        assert (await message).HasField("heartbeat")
        message = asyncio.create_task(anext(client._responses))
        own.cut_silent(499)
        await turn()
        assert not message.done()
        message.cancel()
