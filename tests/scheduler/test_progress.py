"""Engines that stand still, and executors that hand back for ever."""

from typing import Any

import pytest

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.progress import Progress, Stalled
from tests.scheduler.inside import Inside, Wire, inside, submits, turn
from tests.scheduler.world import CARD, LENGTH, Client, Executor, body, granted, world


def beat(progress: Progress, num_steps: int, now_ms: int, *, has_leases: bool = True) -> bool:
    return progress.is_stalled(num_steps, has_leases=has_leases, now_ms=now_ms)


def test_no_step_for_so_long_with_leases_is_a_stall() -> None:
    progress = Progress(1_000)
    assert not beat(progress, 0, 5_000)
    assert not beat(progress, 0, 5_500)
    assert not beat(progress, 0, 5_999)
    assert not beat(progress, 1, 6_000)
    assert not beat(progress, 1, 6_500)
    assert not beat(progress, 1, 6_999)
    assert beat(progress, 1, 7_000)


def test_a_silence_of_ours_is_no_stall_of_theirs() -> None:
    """The scheduler stood still, and now reads what was sent just before and meanwhile."""
    progress = Progress(1_000)
    assert not beat(progress, 7, 0)
    for _ in range(5):
        assert not beat(progress, 7, 90_000)
    assert not beat(progress, 7, 90_499)
    assert beat(progress, 7, 90_500)


def test_the_clock_starts_with_the_work() -> None:
    progress = Progress(1_000)
    assert not beat(progress, 0, 0, has_leases=False)
    assert not beat(progress, 0, 9_000, has_leases=False)
    assert not beat(progress, 0, 9_500)
    assert beat(progress, 0, 10_000)


def test_a_load_is_no_stall() -> None:
    progress = Progress(1_000)
    assert not beat(progress, 3, 0)
    progress.load_began("m")
    assert not beat(progress, 3, 9_000)
    progress.model_changed("m")
    assert not beat(progress, 3, 9_500)
    assert beat(progress, 3, 10_000)


def test_stalled_processes_are_remembered_until_a_new_one_comes() -> None:
    stalled = Stalled(2)
    stalled.add("e", "1")
    assert stalled.has("e", "1")
    assert not stalled.has("f", "1")
    assert not stalled.has("e", "2")
    assert not stalled.has("e", "1")
    for name in "abc":
        stalled.add(name, "1")
    assert [stalled.has(name, "1") for name in "abc"] == [False, True, True]


def heartbeat(num_steps: int, *handles: int) -> fleet.AttachRequest:
    return fleet.AttachRequest(
        heartbeat=fleet.ExecutorHeartbeat(
            handles=handles, last_handle=max(handles, default=0), num_steps=num_steps
        )
    )


async def say(own: Inside, wire: Wire, num_steps: int, *handles: int) -> None:
    wire.send(heartbeat(num_steps, *handles))
    await turn()


async def test_a_stalled_executor_is_cut_and_its_work_goes_on_elsewhere() -> None:
    settings = {"stall_timeout_ms": 2_000, "executor_grace_ms": 0, "heartbeat_timeout_ms": 9_000}
    async with inside(**settings) as own:
        client, wire = await own.client(), await own.executor("e1")
        client.send(submits(0))
        (grant,) = (await wire.read()).orders.grants
        await say(own, wire, 7, grant.handle)
        for ms in (1_000, 999, 1):
            own.now_ms += ms
            await say(own, wire, 7, grant.handle)
        with pytest.raises(HeadwayError, match="makes no steps"):
            await wire.read()
        wire.context.end()
        other = await own.executor("e2")
        (again,) = (await other.read()).orders.grants
        assert again.lease.request_id == grant.lease.request_id
        with pytest.raises(HeadwayError, match="start it anew") as refused:
            await own.executor("e1")
        assert refused.value.reason is Reason.INVALID_REQUEST, "it is not to try again"


async def test_an_executor_that_loads_a_model_has_not_stalled() -> None:
    async with inside(stall_timeout_ms=2_000, heartbeat_timeout_ms=9_000) as own:
        client, wire = await own.client(), await two_models(own)
        client.send(submits(0))
        (grant,) = (await wire.read()).orders.grants
        client.send(submits(1, request=body(model="other")))
        assert (await wire.read()).orders.loads[0].model == "other"
        for _ in range(3):
            own.now_ms += 2_000
            await say(own, wire, 7, grant.handle)
        change = fleet.ModelChange(model="other", state=fleet.ModelChange.STATE_RESIDENT)
        wire.send(fleet.AttachRequest(report=fleet.ExecutorReport(models=[change])))
        assert (await wire.read()).orders.grants, "its stream lives"
        for _ in range(2):
            own.now_ms += 1_000
            await say(own, wire, 7, grant.handle, grant.handle + 1)
        with pytest.raises(HeadwayError, match="makes no steps"):
            await wire.read()


async def test_a_load_that_an_earlier_stream_ordered_is_no_stall_either() -> None:
    async with inside(stall_timeout_ms=2_000, heartbeat_timeout_ms=9_000) as own:
        client, wire = await own.client(), await two_models(own, is_loading=True)
        client.send(submits(0))
        (grant,) = (await wire.read()).orders.grants
        for _ in range(3):
            own.now_ms += 2_000
            await say(own, wire, 7, grant.handle)
        change = fleet.ModelChange(model="other", state=fleet.ModelChange.STATE_RESIDENT)
        wire.send(fleet.AttachRequest(report=fleet.ExecutorReport(models=[change])))
        client.send(submits(1))
        assert (await wire.read()).orders.grants, "its stream lives"


async def two_models(own: Inside, *, is_loading: bool = False) -> Wire:
    """An executor that has one model, and the other one not yet."""
    other = fleet.ModelOffer(card=CARD, loading=is_loading)
    other.card.name = "other"
    hello = fleet.ExecutorHello(
        executor_id="e",
        incarnation="1",
        capacity=fleet.Capacity(num_slots=4, max_models=2),
        models=[fleet.ModelOffer(card=CARD, resident=True), other],
    )
    wire = Wire(own.fleet.Attach)
    wire.send(fleet.AttachRequest(hello=hello))
    await wire.read()
    return wire


@pytest.mark.parametrize("outcome", ["RETURNED", "UNKNOWN", "REVOKED", "unlisted", "changed"])
async def test_what_is_handed_back_again_and_again_ends(outcome: str) -> None:
    async with world(max_returns=2) as own:
        executor, client = await own.pair()
        await client.submit()
        await client.accepted()
        for _ in range(3):
            grant = await executor.grant()
            await hand_back(executor, client, grant, outcome)
        finished = await client.finished()
        assert finished.failure.reason == "ATTEMPTS_EXHAUSTED"
        assert finished.timing.num_attempts == 3


async def hand_back(executor: Executor, client: Client, grant: fleet.Grant, outcome: str) -> None:
    if outcome == "unlisted":
        await executor.send(heartbeat=fleet.ExecutorHeartbeat(last_handle=grant.handle))
    elif outcome == "changed":
        if not grant.generated:
            await executor.tokens(grant.handle, [1])
            await client.until_token(1)
        await executor.tokens(grant.handle, [2])
    else:
        code: Any = fleet.LeaseEnded.Outcome.Value(f"OUTCOME_{outcome}")
        await executor.end(grant.lease, outcome=code)


async def test_a_few_drains_are_no_harm() -> None:
    async with world(max_returns=2) as own:
        executor, client = await own.pair()
        await client.submit()
        await client.accepted()
        for _ in range(2):
            grant = await executor.grant()
            await executor.end(grant.lease, outcome=fleet.LeaseEnded.OUTCOME_RETURNED)
        await executor.run(await executor.grant(), [1, 2, 3, 4])
        assert not (await client.finished()).HasField("failure")
        assert [end.reason for end in client.ends] == [LENGTH]


async def test_a_revoke_of_ours_is_not_counted() -> None:
    async with world(max_returns=0) as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await client.command(cancels=[scheduler.CancelCommand(handle=0)])
        assert (await client.finished()).failure.reason == "CANCELLED"
        await executor.end(grant.lease, outcome=fleet.LeaseEnded.OUTCOME_REVOKED)
        await client.submit(handle=1)
        await executor.run(await executor.grant(), [1, 2, 3, 4])
        assert not (await client.finished()).HasField("failure")
