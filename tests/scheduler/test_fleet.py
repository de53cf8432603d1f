"""FleetService over real gRPC: leases, failover, and executors that speak out of turn."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from headway.errors import HeadwayError, from_rpc_error
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.core import messages
from scheduler_svc.translate import duration
from tests.scheduler.world import (
    CARD,
    LENGTH,
    LOAD_MS,
    Client,
    Executor,
    World,
    body,
    held_lease,
    until_error,
    world,
)

STATE_RESIDENT = fleet.ModelChange.STATE_RESIDENT
STATE_ABSENT = fleet.ModelChange.STATE_ABSENT
STATE_FAILED = fleet.ModelChange.STATE_FAILED


async def submit_and_grant(
    own: World, client: Client, executor: Executor, handle: int = 0, **overrides: object
) -> fleet.Grant:
    await client.submit(handle=handle, request=body(**overrides))
    await client.accepted()
    return await executor.grant()


async def test_an_executor_that_breaks_is_adopted_where_it_stood() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        await client.open()
        grant = await submit_and_grant(own, client, executor)
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
        first, client = own.executor("e1"), own.client()
        await first.attach()
        await client.open()
        grant = await submit_and_grant(own, client, first)
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
        executor, client = own.executor(), own.client()
        await executor.attach()
        await client.open()
        grant = await submit_and_grant(own, client, executor)
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
        executor, client = own.executor(), own.client()
        await executor.attach()
        await client.open()
        grant = await submit_and_grant(own, client, executor)
        await executor.run(grant, [1])
        await client.finished()
        assert (await executor.read()).orders.acknowledged == [grant.lease]
        await executor.end(grant.lease, [1])
        assert (await executor.read()).orders.acknowledged == [grant.lease]


async def test_an_end_with_missing_tokens_is_our_fault_not_the_clients() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        await client.open()
        grant = await submit_and_grant(own, client, executor)
        await executor.tokens(grant.handle, [1])
        await executor.end(grant.lease, [2])
        failure = (await client.finished()).failure
        assert failure.reason == "INTERNAL"


async def test_a_changed_token_ends_the_attempt_and_another_goes_on() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        await client.open()
        grant = await submit_and_grant(own, client, executor)
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
        executor, client = own.executor(), own.client()
        await executor.attach()
        await client.open()
        for number, (told, expected) in enumerate(
            [("INVALID_REQUEST", "INVALID_REQUEST"), ("NOT_LEADER", "INTERNAL")]
        ):
            grant = await submit_and_grant(own, client, executor, handle=number)
            await executor.end(
                grant.lease,
                outcome=fleet.LeaseEnded.OUTCOME_FAILED,
                failure=generation.Failure(reason=told, message="no"),
            )
            assert (await client.finished()).failure.reason == expected


Hostile = Callable[[Executor, fleet.Grant], Awaitable[None]]


def report(**frame: object) -> fleet.ExecutorReport:
    return fleet.ExecutorReport(frame=generation.StepFrame(**frame))  # type: ignore[arg-type]


HOSTILE: dict[str, Hostile] = {
    "second hello": lambda e, g: e.send(hello=fleet.ExecutorHello(executor_id="e1")),
    "empty message": lambda e, g: e.send(),
    "handle never granted": lambda e, g: e.tokens(g.handle + 1, [1]),
    "handle zero": lambda e, g: e.tokens(0, [1]),
    "end of a handle never granted": lambda e, g: e.tokens(g.handle + 9, [], end=True),
    "index gap": lambda e, g: e.tokens(g.handle, [1], start=1),
    "token outside the vocabulary": lambda e, g: e.tokens(g.handle, [1_000]),
    "nan logprob": lambda e, g: e.tokens(g.handle, [1], logprob=[math.nan]),
    "infinite logprob": lambda e, g: e.tokens(g.handle, [1], logprob=[-math.inf]),
    "missing logprob": lambda e, g: e.tokens(g.handle, [1]),
    "too many tokens": lambda e, g: e.tokens(g.handle, [1] * 5, logprob=[-1.0] * 5),
    "short index": lambda e, g: e.send(report=report(handle=[g.handle], token_id=[1])),
    "short logprob": lambda e, g: e.tokens(g.handle, [1, 2], logprob=[-1.0]),
    "end without a reason": lambda e, g: e.send(
        report=report(ends=[generation.SequenceEnd(handle=g.handle)])
    ),
    "end without an outcome": lambda e, g: e.end(
        g.lease, outcome=fleet.LeaseEnded.OUTCOME_UNSPECIFIED
    ),
    "slots without bound": lambda e, g: e.send(
        report=fleet.ExecutorReport(capacity=fleet.Capacity(num_slots=1 << 31, max_models=1))
    ),
    "assets not offered": lambda e, g: e.send(
        report=fleet.ExecutorReport(assets=[fleet.OfferedAssets(model="other")])
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_executor_loses_its_stream_and_harms_nobody(name: str) -> None:
    async with world(executor_grace_ms=1) as own:
        bad, client = own.executor("bad"), own.client()
        await bad.attach()
        await client.open()
        grant = await submit_and_grant(own, client, bad, sampling={"logprobs": True})
        good = own.executor("good")
        await good.attach()
        await HOSTILE[name](bad, grant)
        assert (await until_error(bad.call)).reason is Reason.INVALID_REQUEST
        again = await good.grant()
        held = len(again.generated[0].token_ids) if again.generated else 0
        more = [7] * (4 - held)
        await good.tokens(again.handle, more, start=held, end=True, logprob=[-1.0] * len(more))
        await good.end(again.lease, [4])
        finished = await client.finished()
        assert not finished.HasField("failure")
        assert client.tokens[0] == [1] * held + more


UNKNOWN_FIELD = b"\xfa\x07\x01x"  # number 127: of a contract that is newer than ours
BAD_HELLOS = {
    "of another contract": fleet.AttachRequest.FromString(UNKNOWN_FIELD),
    "no hello": fleet.AttachRequest(heartbeat=fleet.ExecutorHeartbeat()),
    "no name": fleet.AttachRequest(hello=fleet.ExecutorHello()),
    "long name": fleet.AttachRequest(
        hello=fleet.ExecutorHello(executor_id="x" * 300, incarnation="1")
    ),
    "no models fit": fleet.AttachRequest(
        hello=fleet.ExecutorHello(executor_id="x", incarnation="1")
    ),
    "model without a vocabulary": fleet.AttachRequest(
        hello=fleet.ExecutorHello(
            executor_id="x",
            incarnation="1",
            capacity=fleet.Capacity(num_slots=1, max_models=1),
            models=[fleet.ModelOffer(card=generation.ModelCard(name="m"))],
        )
    ),
    "more resident models than it may have": fleet.AttachRequest(
        hello=fleet.ExecutorHello(
            executor_id="x",
            incarnation="1",
            capacity=fleet.Capacity(num_slots=1, max_models=1),
            models=[
                fleet.ModelOffer(
                    card=generation.ModelCard(name=name, vocab_size=9, max_context_tokens=9),
                    resident=True,
                )
                for name in "mn"
            ],
        )
    ),
}


@pytest.mark.parametrize("name", BAD_HELLOS)
async def test_bad_hellos(name: str) -> None:
    async with world() as own:
        executor = own.executor()
        executor.call = executor._stub.Attach()
        await executor.call.write(BAD_HELLOS[name])
        with pytest.raises(HeadwayError) as caught:
            await executor.read()
        assert caught.value.reason is Reason.INVALID_REQUEST


async def test_what_a_newer_executor_says_beyond_the_contract_is_no_harm() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach(newer=UNKNOWN_FIELD)
        await client.open()
        await client.submit()
        await client.accepted()
        grant = await executor.grant()
        heartbeat = fleet.ExecutorHeartbeat(handles=[grant.handle], last_handle=grant.handle)
        heartbeat.MergeFromString(UNKNOWN_FIELD)
        await executor.send(heartbeat=heartbeat)
        await executor.run(grant, [1, 2, 3, 4])
        assert not (await client.finished()).HasField("failure")


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
        first, twin, client = own.executor(), own.executor(), own.client()
        await first.attach()
        await client.open()
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


BAD_OPENS = {
    "no hello": [scheduler.OpenRequest(heartbeat=scheduler.Heartbeat())],
    "empty": [scheduler.OpenRequest()],
    "two hellos": [scheduler.OpenRequest(hello=scheduler.ClientHello())] * 2,
    "unprintable name": [scheduler.OpenRequest(hello=scheduler.ClientHello(client_id="\n"))],
    "cancel of an unused handle": [
        scheduler.OpenRequest(hello=scheduler.ClientHello()),
        scheduler.OpenRequest(
            commands=scheduler.ClientCommands(cancels=[scheduler.CancelCommand(handle=3)])
        ),
    ],
}


@pytest.mark.parametrize("name", BAD_OPENS)
async def test_bad_clients_lose_their_stream(name: str) -> None:
    async with world() as own:
        good, bad = own.client(), own.client()
        await good.open()
        bad.call = bad.stub.Open()
        for message in BAD_OPENS[name]:
            await bad.call.write(message)
        assert (await until_error(bad.call)).reason is Reason.INVALID_REQUEST
        await good.submit(request=body())
        assert (await good.rejected()).failure.reason == "NO_CAPACITY"


async def garbage() -> AsyncIterator[bytes]:
    yield b"\xff" * 100


def methods() -> list[tuple[str, bool, bool]]:
    files = (scheduler.DESCRIPTOR, fleet.DESCRIPTOR)
    return [
        (f"/{service.full_name}/{method.name}", method.client_streaming, method.server_streaming)
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    ]


@pytest.mark.parametrize(("path", "is_streaming", "has_stream"), methods())
async def test_garbage_gets_an_error_of_the_table(
    path: str, is_streaming: bool, has_stream: bool
) -> None:
    async with world() as own:
        channel: Any = own.channel
        if is_streaming:
            call = channel.stream_stream(path)(garbage()).read()
        elif has_stream:
            call = channel.unary_stream(path)(b"\xff" * 100).read()
        else:
            call = channel.unary_unary(path)(b"\xff" * 100)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert from_rpc_error(caught.value).reason is Reason.INVALID_REQUEST
        await own.client().open()


async def test_sequence_ends_may_be_repeated_but_not_changed() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        await client.open()
        grant = await submit_and_grant(own, client, executor, num_samples=2)
        await executor.tokens(grant.handle, [1], end=True)
        await executor.tokens(grant.handle, [], start=1, end=True)
        end = generation.SequenceEnd(
            handle=grant.handle, num_tokens=1, reason=generation.FINISH_REASON_STOP
        )
        await executor.send(report=report(ends=[end]))
        again = await executor.grant()
        assert again.generated[0].end.reason == LENGTH
        assert not again.generated[1].HasField("end")


# --- models come and go: the test speaks for the core -------------------------------------------

OTHER = generation.ModelCard(name="other", vocab_size=1_000, max_context_tokens=100)


def change(state: Any, model: str = "other", **fields: Any) -> fleet.AttachRequest:
    change = fleet.ModelChange(model=model, state=state, **fields)
    return fleet.AttachRequest(report=fleet.ExecutorReport(models=[change]))


async def test_offers_and_changes_of_models_reach_the_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world() as own:
        events: asyncio.Queue[messages.Event] = asyncio.Queue()
        post = own.process.runtime.post

        def listen(event: messages.Event) -> None:
            events.put_nowait(event)
            if not isinstance(event, messages.ModelChanged):
                post(event)

        monkeypatch.setattr(own.process.runtime, "post", listen)
        executor = own.executor()
        await executor.attach(absent=[OTHER], max_models=1)
        attached = events.get_nowait()
        assert isinstance(attached, messages.ExecutorAttached)
        assert attached.max_models == 1
        assert attached.models == (
            messages.ModelOffer("tiny", True),
            messages.ModelOffer("other", False, LOAD_MS),
        )
        failure = generation.Failure(reason="INTERNAL", message="why")
        for message, expected in (
            (change(STATE_ABSENT, "tiny"), ("tiny", messages.ModelState.ABSENT)),
            (
                change(STATE_RESIDENT, load_time=duration(70)),
                ("other", messages.ModelState.RESIDENT, 70),
            ),
            (
                change(STATE_FAILED, failure=failure),
                ("other", messages.ModelState.FAILED, None, "why"),
            ),
        ):
            await executor.call.write(message)
            assert await events.get() == messages.ModelChanged("e1", attached.session, *expected)


async def test_loads_and_decisions_leave_the_core(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with world() as own:
        core = own.process.runtime._core
        handle = core.handle

        def decide(event: messages.Event, now_ms: int) -> messages.Effects:
            effects = handle(event, now_ms)
            if not isinstance(event, messages.ExecutorAttached):
                return effects
            load = messages.ModelLoadOrdered("e1", event.session, "other", ("tiny",))
            why = messages.Decision("load", "req_1", "other", "it has waited long enough")
            return replace(effects, send=(*effects.send, load), decisions=(why,))

        monkeypatch.setattr(core, "handle", decide)
        executor = own.executor()
        await executor.attach(absent=[OTHER], max_models=1)
        orders = (await executor.read()).orders
        assert list(orders.loads) == [fleet.LoadModel(model="other", evict=["tiny"])]
    out = capsys.readouterr().out
    assert "decision.made" in out
    assert "it has waited long enough" in out
    assert "model.ordered" in out


@pytest.mark.parametrize(
    "message",
    [
        change(STATE_RESIDENT, "stranger"),
        change(fleet.ModelChange.STATE_UNSPECIFIED),
        change(STATE_RESIDENT, load_time=duration(-1)),
    ],
    ids=["not offered", "no state", "negative"],
)
async def test_changes_that_make_no_sense_end_the_stream(message: fleet.AttachRequest) -> None:
    async with world() as own:
        executor = own.executor()
        await executor.attach(absent=[OTHER], max_models=1)
        await executor.call.write(message)
        assert (await until_error(executor.call)).reason is Reason.INVALID_REQUEST
