"""The scheduler client's other calls: futures, models, look-ups, bounds, and other schedulers."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from types import SimpleNamespace

import pytest

from gateway_http import connection
from gateway_http.client import Finish, SchedulerClient
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.conftest import settings_for, work
from tests.gateway.scripted import WAIT_S, ScriptedScheduler
from tests.gateway.scripted_runs import failure, leave_alone


async def _model(client: SchedulerClient) -> object:
    return await client.model(tiny_model.NAME)


async def test_an_absent_scheduler_is_no_capacity_in_time() -> None:
    settings = GatewaySettings(
        scheduler_addresses="127.0.0.1:1", submit_timeout_s=0.05, unary_timeout_s=0.05
    )
    client = SchedulerClient(settings)
    async with client.running():
        for call in (client.submit(work()), client.list_models(), client.model("any")):
            with pytest.raises(HeadwayError) as caught:
                await call
            assert caught.value.reason is Reason.NO_CAPACITY
        assert client.num_inflight == 0


async def test_the_log_says_once_that_a_scheduler_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = GatewaySettings(
        scheduler_addresses="127.0.0.1:1", reconnect_backoff_min_ms=1, reconnect_backoff_max_ms=1
    )
    has_tried_again = asyncio.Event()
    told = []

    def note(level: str, event: str, **fields: str) -> None:
        told.append((level, event, fields["address"]))
        if len(told) == 3:
            has_tried_again.set()

    log = SimpleNamespace(info=partial(note, "info"), debug=partial(note, "debug"))
    monkeypatch.setattr(connection, "_log", log)
    async with SchedulerClient(settings).running():
        await asyncio.wait_for(has_tried_again.wait(), WAIT_S)
    levels = ("info", "debug", "debug")
    assert told[:3] == [(level, "scheduler.missed", "127.0.0.1:1") for level in levels]


async def test_the_next_address_is_tried(scheduler: ScriptedScheduler) -> None:
    addresses = f"127.0.0.1:1,127.0.0.1:{scheduler.port}"
    client = SchedulerClient(settings_for(scheduler, scheduler_addresses=addresses))
    async with client.running():
        assert (await client.submit(work())).request_id == "run-0"


async def test_not_leader_sends_us_elsewhere(scheduler: ScriptedScheduler) -> None:
    scheduler.refusal = failure(Reason.NOT_LEADER)
    leader = ScriptedScheduler()  # type: ignore[abstract]
    leader.port = await leader.start()
    addresses = f"127.0.0.1:{scheduler.port},127.0.0.1:{leader.port}"
    client = SchedulerClient(settings_for(scheduler, scheduler_addresses=addresses))
    async with client.running():
        await client.submit(work())
    assert len(leader.runs) == 1
    await leader.stop()


async def test_bounds_of_one_gateway(scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    settings = settings_for(scheduler, max_inflight=1, max_request_bytes=1000)
    client = SchedulerClient(settings)
    async with client.running():
        too_large = generation_pb2.GenerationRequest(prompt_token_ids=range(100_000))
        with pytest.raises(HeadwayError) as caught:
            client.generate(too_large)
        assert caught.value.reason is Reason.BODY_TOO_LARGE
        first = client.generate(work())
        with pytest.raises(HeadwayError) as caught:
            client.generate(work())
        assert caught.value.reason is Reason.NO_CAPACITY
        await first.accepted()
        client.drain()
        with pytest.raises(HeadwayError) as caught:
            client.generate(work())
        assert caught.value.reason is Reason.DRAINING
        client.fail_all()
        last = [event async for event in first][-1]
        assert isinstance(last, Finish)
        assert last.error is not None
        assert last.error.reason is Reason.DRAINING


async def test_futures(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
    scheduler.script = leave_alone
    accepted = await client.submit(work(tenant="t"))
    assert client.num_inflight == 0
    pending = await client.retrieve(accepted.request_id, "t", 0.01)
    assert isinstance(pending, generation_pb2.QueueStatus)
    run = await scheduler.run()
    run.emit([5])
    run.finish()
    result = await client.retrieve(accepted.request_id, "t")
    assert isinstance(result, generation_pb2.GenerationResult)
    assert list(result.samples[0].token_ids) == [5]
    with pytest.raises(HeadwayError) as caught:
        await client.retrieve(accepted.request_id, "another")
    assert caught.value.reason is Reason.REQUEST_NOT_FOUND
    await client.cancel(accepted.request_id, "t")
    assert scheduler.cancelled == [accepted.request_id]


async def test_models_are_read_once_and_looked_up_together(scheduler: ScriptedScheduler) -> None:
    client = SchedulerClient(settings_for(scheduler, model_ttl_s=1e-6))
    async with client.running():
        first = await asyncio.gather(*(client.model(tiny_model.NAME) for _ in range(5)))
        again = await client.model(tiny_model.NAME)
        assert scheduler.num_asset_reads == 1
        assert again.text is first[0].text
        scheduler.models = []
        with pytest.raises(HeadwayError) as caught:
            await client.model(tiny_model.NAME)
        assert caught.value.reason is Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize("ask", [_model, SchedulerClient.list_models, SchedulerClient.snapshot])
async def test_a_look_up_outlives_its_connection(
    client: SchedulerClient,
    scheduler: ScriptedScheduler,
    ask: Callable[[SchedulerClient], Coroutine[None, None, object]],
) -> None:
    scheduler.looks_up.clear()
    answer = asyncio.create_task(ask(client))
    await scheduler.until(lambda: scheduler.num_look_ups == 1)
    scheduler.drop_connections()
    await scheduler.until(lambda: scheduler.num_look_ups == 2)
    scheduler.looks_up.set()
    assert await answer is not None


async def test_whoever_stops_asking_is_not_held(
    client: SchedulerClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.looks_up.clear()
    answer = asyncio.create_task(client.list_models())
    await scheduler.until(lambda: scheduler.num_look_ups == 1)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    scheduler.looks_up.set()
