"""SchedulerService: what clients may ask for. Each call translates and hands over."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from scheduler_svc import translate
from scheduler_svc.calls import GenerateCall
from scheduler_svc.catalog import Catalog
from scheduler_svc.checks import check_name
from scheduler_svc.clients import ClientSession, submission_from_proto
from scheduler_svc.groups import Group
from scheduler_svc.positions import Positions
from scheduler_svc.requests import FutureSink, LiveRequest
from scheduler_svc.runtime import Runtime
from scheduler_svc.streams import Context, Places, Pulse, on_call_end


class SchedulerService(scheduler_pb2_grpc.SchedulerServiceServicer):
    """The door for clients."""

    def __init__(self, runtime: Runtime, catalog: Catalog, pulse: Pulse) -> None:
        settings = pulse.settings
        self._runtime = runtime
        self._catalog = catalog
        self._pulse = pulse
        self._settings = settings
        self._streams = Places(settings.max_client_streams)
        self._num_waiters = 0
        self._positions = Positions(settings.max_positions_per_tick)

    async def run(self) -> None:
        """Sends positions; runs until cancelled."""
        while True:
            await asyncio.sleep(self._settings.position_interval_ms / 1_000)
            self._positions.tick()

    async def Open(  # noqa: N802
        self, request_iterator: AsyncIterator[scheduler.OpenRequest], context: Context
    ) -> AsyncIterator[scheduler.OpenResponse]:
        """See scheduler.proto."""
        self._streams.take(context)
        session = ClientSession(self._runtime, self._catalog, self._pulse, self._positions)
        async for response in session.run(request_iterator, context):
            yield response

    async def Generate(  # noqa: N802
        self, request: scheduler.GenerateRequest, context: Context
    ) -> AsyncIterator[scheduler.GenerateResponse]:
        """See scheduler.proto. A call that ends early cancels its request; with an idempotency
        key only after the resume grace, so that a repeated call finds it alive."""
        self._streams.take(context)
        grace_ms = self._settings.resume_grace_ms if request.request.idempotency_key else 0
        call = GenerateCall(self._runtime, self._pulse, grace_ms)
        on_call_end(context, call.end)
        await context.send_initial_metadata(())
        live = await self._submit(request.request, is_detached=False, grace_ms=grace_ms)
        async for response in call.follow(live):
            yield response

    async def Submit(  # noqa: N802
        self, request: scheduler.SubmitRequest, context: Context
    ) -> scheduler.SubmitResponse:
        """See scheduler.proto."""
        live = await self._submit(request.request, is_detached=True, grace_ms=0)
        return scheduler.SubmitResponse(
            request_id=live.request_id, status=self._runtime.status(live)
        )

    async def Retrieve(  # noqa: N802
        self, request: scheduler.RetrieveRequest, context: Context
    ) -> scheduler.RetrieveResponse:
        """See scheduler.proto. Beyond ``max_retrieve_waiters`` it answers without waiting."""
        live = self._runtime.find(request.request_id, request.tenant)
        if live is None:
            result = await self._runtime.results.load(request.request_id, request.tenant)
            return scheduler.RetrieveResponse(result=result)
        live.asked_ms = self._runtime.clock_ms()
        wait_ms = self._wait_ms(request)
        if wait_ms:
            waited = await self._wait_for_end(live, wait_ms / 1_000)
            if waited is not None:
                return scheduler.RetrieveResponse(result=waited)
        return scheduler.RetrieveResponse(pending=self._runtime.status(live))

    async def WaitFinished(  # noqa: N802
        self, request: scheduler.WaitFinishedRequest, context: Context
    ) -> scheduler.WaitFinishedResponse:
        """See scheduler.proto. Beyond ``max_retrieve_waiters`` it answers without waiting."""
        most = self._settings.max_name_chars
        check_name(request.tenant, "tenant", most, may_be_empty=True)
        check_name(request.group, "group", most)
        group = (request.tenant, request.group)
        wait_ms = self._wait_ms(request)
        groups, clock_ms = self._runtime.groups, self._runtime.clock_ms
        finished, cursor = groups.since(group, request.cursor, clock_ms())
        if wait_ms and not finished:
            await self._wait_for_group(group, wait_ms / 1_000)
            finished, cursor = groups.since(group, request.cursor, clock_ms())
        return scheduler.WaitFinishedResponse(finished=finished, cursor=cursor)

    async def Cancel(  # noqa: N802
        self, request: scheduler.CancelRequest, context: Context
    ) -> scheduler.CancelResponse:
        """See scheduler.proto."""
        await self._runtime.room()
        live = self._runtime.find(request.request_id, request.tenant)
        if live is not None:
            self._runtime.cancel(live)
            await self._wait_for_end(live, None)
        return scheduler.CancelResponse()

    async def ListModels(  # noqa: N802
        self, request: scheduler.ListModelsRequest, context: Context
    ) -> scheduler.ListModelsResponse:
        """See scheduler.proto."""
        return scheduler.ListModelsResponse(models=self._catalog.cards())

    async def GetModel(  # noqa: N802
        self, request: scheduler.GetModelRequest, context: Context
    ) -> scheduler.GetModelResponse:
        """See scheduler.proto."""
        card = self._catalog.card(request.model)
        if card.assets_digest and card.assets_digest == request.known_assets_digest:
            return scheduler.GetModelResponse(card=card)
        return scheduler.GetModelResponse(card=card, assets=self._catalog.assets(request.model))

    async def _submit(
        self, body: generation.GenerationRequest, *, is_detached: bool, grace_ms: int
    ) -> LiveRequest:
        def abandon(live: LiveRequest) -> None:
            # A future whose id nobody was told can be found again by its key only.
            if is_detached and not body.idempotency_key:
                self._runtime.cancel(live)
            else:
                self._runtime.abandon(live, grace_ms)

        await self._runtime.room()
        sink = FutureSink(abandon)
        submission = submission_from_proto(
            body, self._catalog, self._pulse, sink, is_detached=is_detached
        )
        self._runtime.submit(submission)
        return await sink.answer()

    def _wait_ms(self, request: scheduler.RetrieveRequest | scheduler.WaitFinishedRequest) -> int:
        """How long a call may wait: not at all where too many wait already."""
        if not request.HasField("wait"):
            return 0
        most = self._settings.max_retrieve_wait_ms
        wait_ms = translate.duration_ms(request.wait, "wait", least=0, most=most)
        return wait_ms if self._num_waiters < self._settings.max_retrieve_waiters else 0

    async def _wait_for_group(self, group: Group, timeout_s: float) -> None:
        """Until the next end in the group."""
        end = asyncio.Event()
        self._runtime.groups.watch(group, end.set)
        self._num_waiters += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await end.wait()
        finally:
            self._num_waiters -= 1
            self._runtime.groups.unwatch(group, end.set)

    async def _wait_for_end(
        self, live: LiveRequest, timeout_s: float | None
    ) -> generation.GenerationResult | None:
        end: asyncio.Future[generation.GenerationResult]
        end = asyncio.get_running_loop().create_future()
        live.waiters.append(end)
        self._num_waiters += 1
        try:
            done, _ = await asyncio.wait([end], timeout=timeout_s)
            return end.result() if done else None
        finally:
            self._num_waiters -= 1
            live.waiters.remove(end)
            live.asked_ms = self._runtime.clock_ms()
