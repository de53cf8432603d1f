"""Executors and clients that speak out of turn lose their stream, and harm nobody else."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from headway.errors import HeadwayError, from_rpc_error
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from tests.scheduler.world import Executor, body, granted, until_error, world

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
        bad, client = await own.pair("bad")
        grant = await granted(bad, client, sampling={"logprobs": True})
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


def _of_models(max_models: int, **flags: str) -> fleet.AttachRequest:
    """Models by name, with the names of what is true of each."""
    offers = [
        fleet.ModelOffer(
            card=generation.ModelCard(name=name, vocab_size=9, max_context_tokens=9),
            resident="resident" in true,
            loading="loading" in true,
        )
        for name, true in flags.items()
    ]
    capacity = fleet.Capacity(num_slots=1, max_models=max_models)
    hello = fleet.ExecutorHello(executor_id="x", incarnation="1", capacity=capacity, models=offers)
    return fleet.AttachRequest(hello=hello)


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
    "more resident models than it may have": _of_models(1, m="resident", n="resident"),
    "a model on its way that has no place": _of_models(1, m="resident", n="loading"),
    "a model on its way that is there": _of_models(2, m="resident loading"),
    "two models on their way": _of_models(2, m="loading", n="loading"),
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
        executor, client = await own.pair(newer=UNKNOWN_FIELD)
        grant = await granted(executor, client)
        heartbeat = fleet.ExecutorHeartbeat(handles=[grant.handle], last_handle=grant.handle)
        heartbeat.MergeFromString(UNKNOWN_FIELD)
        await executor.send(heartbeat=heartbeat)
        await executor.run(grant, [1, 2, 3, 4])
        assert not (await client.finished()).HasField("failure")


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
