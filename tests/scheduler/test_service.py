"""SchedulerService over real gRPC, its plain calls: Generate, Submit, Retrieve, Cancel, models."""

import asyncio
from typing import Any

import grpc.aio
import pytest

from headway.errors import from_rpc_error
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc import translate
from tests.scheduler.world import CARD, Client, body, world


async def reason_of(call: object) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return from_rpc_error(caught.value).reason


async def test_generate_streams_accepted_tokens_finished() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        call = client.stub.Generate(scheduler.GenerateRequest(request=body()))
        grant = await executor.grant()
        await executor.run(grant, [4, 5, 6])
        messages = [message async for message in call]
        assert messages[0].accepted.request_id == grant.lease.request_id
        frames = [message.frame for message in messages[1:-1]]
        assert [token for frame in frames for token in frame.token_id] == [4, 5, 6]
        assert {handle for frame in frames for handle in frame.handle} == {0}
        assert messages[-1].finished.usage.num_generated_tokens == 3


async def test_generate_cancels_on_hang_up() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        call: Any = client.stub.Generate(scheduler.GenerateRequest(request=body()))
        assert (await call.read()).HasField("accepted")
        grant = await executor.grant()
        call.cancel()
        assert list((await executor.read()).orders.revokes) == [grant.lease]


async def test_generate_refuses_with_a_status() -> None:
    async with world() as own:
        call = own.client().stub.Generate(scheduler.GenerateRequest(request=body()))
        assert await reason_of(call.read()) is Reason.NO_CAPACITY


async def test_submit_and_retrieve() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        submitted = await client.stub.Submit(scheduler.SubmitRequest(request=body()))
        retrieve = scheduler.RetrieveRequest(request_id=submitted.request_id, tenant="t")
        pending = await client.stub.Retrieve(retrieve)
        assert pending.pending.state == generation.QueueStatus.STATE_RUNNING
        foreign = scheduler.RetrieveRequest(request_id=submitted.request_id, tenant="x")
        assert await reason_of(client.stub.Retrieve(foreign)) is Reason.REQUEST_NOT_FOUND
        retrieve.wait.FromSeconds(30)
        waiting = asyncio.ensure_future(client.stub.Retrieve(retrieve))
        await executor.run(await executor.grant(), [1, 2])
        first = await waiting
        assert list(first.result.samples[0].token_ids) == [1, 2]
        assert first == await client.stub.Retrieve(retrieve)
        assert await reason_of(client.stub.Retrieve(foreign)) is Reason.REQUEST_NOT_FOUND


async def test_retrieve_waiters_are_bounded() -> None:
    async with world(max_retrieve_waiters=0) as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        submitted = await client.stub.Submit(scheduler.SubmitRequest(request=body()))
        answer = await client.stub.Retrieve(
            scheduler.RetrieveRequest(
                request_id=submitted.request_id, tenant="t", wait=translate.duration(60_000)
            )
        )
        assert answer.HasField("pending")


async def test_cancel_ends_a_future_and_ignores_others() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        submitted = await client.stub.Submit(scheduler.SubmitRequest(request=body()))
        await executor.grant()
        await client.stub.Cancel(
            scheduler.CancelRequest(request_id=submitted.request_id, tenant="x")
        )
        await client.stub.Cancel(scheduler.CancelRequest(request_id="req_none"))
        await client.stub.Cancel(
            scheduler.CancelRequest(request_id=submitted.request_id, tenant="t")
        )
        answer = await client.stub.Retrieve(
            scheduler.RetrieveRequest(
                request_id=submitted.request_id, tenant="t", wait=translate.duration(5_000)
            )
        )
        assert answer.result.failure.reason == "CANCELLED"
        assert not answer.result.samples


async def test_models_and_their_assets() -> None:
    async with world(executor_grace_ms=0) as own:
        executor, stub = own.executor(), own.client().stub
        assert not (await stub.ListModels(scheduler.ListModelsRequest())).models
        welcome = await executor.attach()
        assert list(welcome.wanted_assets) == ["tiny"]
        assert list((await stub.ListModels(scheduler.ListModelsRequest())).models) == [CARD]
        ask = scheduler.GetModelRequest(model="tiny")
        assert await reason_of(stub.GetModel(ask)) is Reason.NO_CAPACITY
        assets = generation.ModelAssets(tokenizer_json=b"{}")
        offered = fleet.OfferedAssets(model="tiny", assets=assets)
        await executor.send(report=fleet.ExecutorReport(assets=[offered]))
        await executor.send(report=fleet.ExecutorReport())
        submitted = Client(own.channel)
        await submitted.open()
        await submitted.submit()
        await executor.grant()
        got = await stub.GetModel(ask)
        assert (got.card, got.assets) == (CARD, assets)
        ask.known_assets_digest = "a1"
        assert not (await stub.GetModel(ask)).HasField("assets")
        missing = scheduler.GetModelRequest(model="none")
        assert await reason_of(stub.GetModel(missing)) is Reason.MODEL_NOT_FOUND
        assert not (await own.executor("e2").attach()).wanted_assets
