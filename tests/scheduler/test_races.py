"""What happens between two awaits: cancelled calls, late commits, a loop that stood still."""

import asyncio

import pytest
import structlog.testing

from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc import translate
from scheduler_svc.core import messages
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.streams import Pulse
from tests.scheduler.inside import FakeContext, Inside, inside, submits, turn
from tests.scheduler.test_runtime import GatedStore
from tests.scheduler.world import CARD, Client, body, world


async def test_a_call_cancelled_just_as_it_is_answered_cancels_its_request() -> None:
    own = Inside()
    own.catalog.attach("e1", 1, [fleet.ModelOffer(card=CARD)])
    request = scheduler.SubmitRequest(request=body())
    call = asyncio.create_task(own.service.Submit(request, FakeContext()))  # type: ignore[arg-type]
    await turn()
    (submission,) = own.runtime._requests.pending.values()
    submission.sink.accepted(submission.to_live())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    events = own.runtime._mailbox.take(10)
    assert isinstance(events[-1], messages.Cancel)


async def committed(client: Client, store: GatedStore) -> scheduler.SubmitResponse:
    """A future of which everything is in the store."""
    submitting = asyncio.ensure_future(client.stub.Submit(scheduler.SubmitRequest(request=body())))
    store.gate.release()
    submitted = await submitting
    await store.entered.get()
    return submitted


async def test_retrieve_says_running_while_the_end_is_committed() -> None:
    store = GatedStore()
    async with world(store) as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        submitted = await committed(client, store)
        await executor.run(await executor.grant(), [1, 2])
        await store.entered.get()
        ask = scheduler.RetrieveRequest(request_id=submitted.request_id, tenant="t")
        pending = (await client.stub.Retrieve(ask)).pending
        store.gate.release()
        assert pending.state == generation.QueueStatus.STATE_RUNNING
        assert pending.num_generated_tokens == 2


async def test_cancel_is_answered_after_its_commit() -> None:
    store = GatedStore()
    async with world(store) as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        submitted = await committed(client, store)
        cancel = scheduler.CancelRequest(request_id=submitted.request_id, tenant="t")
        cancelling = asyncio.ensure_future(client.stub.Cancel(cancel))
        await store.entered.get()
        await client.stub.ListModels(scheduler.ListModelsRequest())
        assert not cancelling.done()
        store.gate.release()
        await cancelling
        ask = scheduler.RetrieveRequest(request_id=submitted.request_id, tenant="t")
        assert (await client.stub.Retrieve(ask)).result.failure.reason == "CANCELLED"


class Felt:
    """A stream that notes when its pulse was felt."""

    def __init__(self) -> None:
        self.felt_ms: list[int] = []

    def check_pulse(self, now_ms: int) -> None:
        self.felt_ms.append(now_ms)


async def test_peers_are_not_blamed_for_a_loop_that_stood_still() -> None:
    times = iter([0, 5, 10, 60_000, 60_005, 60_010])
    pulse = Pulse(SchedulerSettings(heartbeat_interval_ms=10), lambda: next(times))
    stream = Felt()
    pulse.streams.add(stream)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await pulse.run()
    assert 10 in stream.felt_ms
    assert 60_000 not in stream.felt_ms
    assert 60_005 in stream.felt_ms


async def test_a_lease_that_completes_as_it_is_revoked_is_no_fault() -> None:
    async with inside() as own:
        executor, client = await own.executor(), await own.client()
        client.send(submits(0))
        grant = (await executor.read()).orders.grants[0]
        commands = scheduler.ClientCommands(cancels=[scheduler.CancelCommand(handle=0)])
        client.send(scheduler.OpenRequest(commands=commands))
        assert (await executor.read()).orders.revokes
        frame = generation.StepFrame(handle=[grant.handle], index=[0], token_id=[1])
        ended = fleet.LeaseEnded(
            lease=grant.lease, outcome=fleet.LeaseEnded.OUTCOME_COMPLETED, num_tokens=[1]
        )
        with structlog.testing.capture_logs() as logs:
            executor.send(
                fleet.AttachRequest(report=fleet.ExecutorReport(frame=frame, ended=[ended]))
            )
            assert (await executor.read()).orders.acknowledged == [grant.lease]
        assert not [line for line in logs if line["event"] == "lease.faulted"]


async def test_an_executors_own_words_about_its_faults_stay_in_the_log() -> None:
    async with world() as own:
        executor, client = await own.pair()
        await client.submit()
        grant = await executor.grant()
        await executor.end(
            grant.lease,
            outcome=fleet.LeaseEnded.OUTCOME_FAILED,
            failure=generation.Failure(reason="INTERNAL", message="/secret/path: CUDA died"),
        )
        assert "secret" not in (await client.finished()).failure.message


async def test_a_finished_output_takes_no_more_tokens() -> None:
    """Also when its last lease opens after the end was decided (both in one batch)."""
    from scheduler_svc.relay import Routes
    from tests.scheduler.test_relay import frame, make_output

    routes, output = Routes(1), make_output()
    output.seal()
    lease = routes.open(output, 1)
    output.finish(generation.GenerationResult())
    routes.accept_frame(frame((lease.handle, 0, 1)))
    assert output.num_tokens == 0


async def test_cancel_of_a_foreign_request_neither_cancels_nor_waits() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await executor.attach()
        submitted = await client.stub.Submit(scheduler.SubmitRequest(request=body()))
        foreign = scheduler.CancelRequest(request_id=submitted.request_id, tenant="x")
        await client.stub.Cancel(foreign)
        ask = scheduler.RetrieveRequest(
            request_id=submitted.request_id, tenant="t", wait=translate.duration(1)
        )
        assert (await client.stub.Retrieve(ask)).HasField("pending")
