"""Persist before send, and what happens when the store or a task fails."""

import asyncio
from collections.abc import Sequence

import pytest

from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.clients import ClientSession
from scheduler_svc.fleet import ExecutorSession
from scheduler_svc.process import make_store, started
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.store.base import AcceptedRecord, FinishedRecord, StoreRecord
from scheduler_svc.store.memory import MemoryStore
from tests.scheduler.inside import inside, submits
from tests.scheduler.world import body, world


class GatedStore(MemoryStore):
    """Commits only when the test lets it; an exception given to ``fail`` is raised instead."""

    def __init__(self) -> None:
        super().__init__(result_ttl_ms=60_000, max_result_bytes=1 << 20, max_tombstones=10)
        self.entered: asyncio.Queue[Sequence[StoreRecord]] = asyncio.Queue()
        self.gate = asyncio.Semaphore(0)
        self.failure: Exception | None = None

    async def commit(self, records: Sequence[StoreRecord]) -> None:
        if self.failure is not None:
            raise self.failure
        self.entered.put_nowait(list(records))
        await self.gate.acquire()
        await super().commit(records)


async def test_nothing_is_sent_before_its_commit() -> None:
    store = GatedStore()
    async with world(store) as own:
        executor, client = await own.pair()
        await client.submit()
        (record,) = await store.entered.get()
        assert isinstance(record, AcceptedRecord)
        accepted = asyncio.ensure_future(client.accepted())
        grant = asyncio.ensure_future(executor.grant())
        await client.stub.ListModels(scheduler.ListModelsRequest())  # the loop turns
        assert not accepted.done()
        assert not grant.done()
        store.gate.release()
        assert (await accepted).request_id == record.request_id
        assert (await grant).lease.request_id == record.request_id

        await executor.run(await grant, [1, 2])
        (end,) = await store.entered.get()
        assert isinstance(end, FinishedRecord)
        await client.until_token(2)
        finished = asyncio.ensure_future(client.finished())
        acknowledged = asyncio.ensure_future(executor.read())
        await client.stub.ListModels(scheduler.ListModelsRequest())
        assert not finished.done()
        assert not acknowledged.done()
        store.gate.release()
        assert not (await finished).HasField("failure")
        assert (await acknowledged).orders.acknowledged


async def test_work_leaves_before_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def note(owner: type, method: str) -> None:
        original = getattr(owner, method)

        def noting(self: object, *args: object) -> None:
            told.append(method)
            original(self, *args)

        monkeypatch.setattr(owner, method, noting)

    note(ExecutorSession, "grant")
    note(ClientSession, "on_accepted")
    async with inside() as own:
        executor, client = await own.executor(), await own.client()
        client.send(submits(0))
        await executor.read()
    assert told == ["grant", "on_accepted"]


async def test_what_gathers_during_a_commit_goes_into_the_next_one() -> None:
    store = GatedStore()
    async with world(store) as own:
        _, client = await own.pair()
        await client.submit(handle=0)
        assert len(await store.entered.get()) == 1
        for handle in range(1, 6):
            await client.submit(handle=handle)
        await client.command(resumes=[scheduler.ResumeCommand(handle=6, request_id="none")])
        assert (await client.rejected()).handle == 6  # so all submits are in the mailbox
        store.gate.release()
        assert len(await store.entered.get()) == 5
        store.gate.release()
        accepted = 0
        while accepted < 6:
            accepted += len((await client.updates()).accepted)


async def submit_and_wait(store: MemoryStore) -> None:
    async with world(store) as own:
        _, client = await own.pair()
        await client.submit()
        await asyncio.Event().wait()


async def test_a_failed_commit_ends_the_process() -> None:
    store = GatedStore()
    store.failure = OSError("disk")
    with pytest.raises(ExceptionGroup) as caught:
        await submit_and_wait(store)
    assert caught.value.subgroup(OSError) is not None


async def test_a_full_mailbox_slows_readers_and_loses_nothing() -> None:
    async with world(max_mailbox_events=1, max_batch_events=1) as own:
        _, client = await own.pair(num_slots=64)
        for handle in range(20):
            await client.submit(handle=handle, detached=True)
        accepted = 0
        while accepted < 20:
            accepted += len((await client.updates()).accepted)


async def test_drain_refuses_new_requests_and_finishes_the_others() -> None:
    async with world() as own:
        executor, client = await own.pair()
        await client.submit()
        await client.accepted()
        drained = asyncio.ensure_future(own.process.drain())
        grant = await executor.grant()
        await executor.tokens(grant.handle, [1])
        await client.until_token(1)
        await client.submit(handle=1)
        assert (await client.rejected()).failure.reason == "DRAINING"
        assert not drained.done()
        await executor.tokens(grant.handle, [], start=1, end=True)
        await executor.end(grant.lease, [1])
        await client.finished()
        await drained


async def test_drain_gives_up_after_its_timeout() -> None:
    async with world(drain_timeout_ms=1) as own:
        _, client = await own.pair()
        await client.submit()
        await client.accepted()
        await own.process.drain()


async def test_two_starts_have_rising_epochs() -> None:
    settings = SchedulerSettings(port=0, stop_grace_ms=0)
    epochs = []
    for _ in range(2):
        async with started(settings, make_store(settings)) as process:
            epochs.append(process.runtime.epoch)
    assert epochs[0] < epochs[1]


async def test_a_request_times_out_in_the_queue_without_any_event() -> None:
    async with world() as own:
        _, client = await own.pair(num_slots=1)
        await client.submit(handle=0)
        await client.accepted()
        request = body()
        request.queue_timeout.FromMilliseconds(5)
        await client.submit(handle=1, request=request)
        while True:
            updates = await client.updates()
            if updates.finished or updates.rejected:
                break
        if updates.finished:
            assert updates.finished[0].failure.reason == "QUEUE_TIMEOUT"
        else:
            assert updates.rejected[0].failure.reason == "DEADLINE_UNREACHABLE"


async def test_a_start_that_fails_closes_its_store() -> None:
    class Closable(GatedStore):
        is_closed = False

        async def close(self) -> None:
            self.is_closed = True

    store = Closable()
    async with world() as own:
        taken = SchedulerSettings(port=own.process.port)
        with pytest.raises(OSError, match="cannot listen"):
            await started(taken, store).__aenter__()
    assert store.is_closed
