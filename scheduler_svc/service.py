"""SchedulerService: what clients may ask for. Each call translates and hands over."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from scheduler_svc import translate
from scheduler_svc.catalog import Catalog
from scheduler_svc.clients import ClientSession, Positions, submission_from_proto
from scheduler_svc.requests import FutureSink, LiveRequest
from scheduler_svc.runtime import Runtime
from scheduler_svc.streams import Context, Places, Pulse, on_call_end
from scheduler_svc.subscriptions import Feed


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
        self._streams.take()
        session = ClientSession(
            self._runtime, self._catalog, self._pulse, self._streams, self._positions
        )
        async for response in session.run(request_iterator, context):
            yield response

    async def Generate(  # noqa: N802
        self, request: scheduler.GenerateRequest, context: Context
    ) -> AsyncIterator[scheduler.GenerateResponse]:
        """See scheduler.proto. A call that ends early cancels its request; with an idempotency
        key only after the resume grace, so that a repeated call finds it alive."""
        self._streams.take()
        has_key = bool(request.request.idempotency_key)
        call = _GenerateCall(self._runtime, self._settings.resume_grace_ms if has_key else 0)
        on_call_end(context, partial(call.end, self._streams))
        await context.send_initial_metadata(())
        live = await self._submit(request.request, is_detached=False, grace_ms=call.grace_ms)
        call.follow(live)
        accepted = scheduler.Accepted(request_id=live.request_id, status=self._runtime.status(live))
        yield scheduler.GenerateResponse(accepted=accepted)
        while True:
            await call.news.wait()
            call.news.clear()
            updates = call.feed.take(self._settings.max_frame_tokens)
            if updates.HasField("frame"):
                yield scheduler.GenerateResponse(frame=updates.frame)
            for finished in updates.finished:
                yield scheduler.GenerateResponse(finished=finished)
                return
            await asyncio.sleep(self._settings.generate_flush_ms / 1_000)

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
            result = await self._runtime.load(request.request_id, request.tenant)
            return scheduler.RetrieveResponse(result=result)
        wait_ms = 0
        if request.HasField("wait"):
            most = self._settings.max_retrieve_wait_ms
            wait_ms = translate.duration_ms(request.wait, "wait", least=0, most=most)
        if wait_ms and self._num_waiters < self._settings.max_retrieve_waiters:
            waited = await self._wait_for_end(live, wait_ms)
            if waited is not None:
                return scheduler.RetrieveResponse(result=waited)
        status = self._runtime.status(live) or generation.QueueStatus()
        return scheduler.RetrieveResponse(pending=status)

    async def Cancel(  # noqa: N802
        self, request: scheduler.CancelRequest, context: Context
    ) -> scheduler.CancelResponse:
        """See scheduler.proto."""
        await self._runtime.room()
        live = self._runtime.find(request.request_id, request.tenant)
        if live is not None:
            self._runtime.cancel(live)
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
        return await sink.answer

    async def _wait_for_end(
        self, live: LiveRequest, wait_ms: int
    ) -> generation.GenerationResult | None:
        end: asyncio.Future[generation.GenerationResult]
        end = asyncio.get_running_loop().create_future()
        live.waiters.append(end)
        self._num_waiters += 1
        try:
            done, _ = await asyncio.wait([end], timeout=wait_ms / 1_000)
            return end.result() if done else None
        finally:
            self._num_waiters -= 1
            live.waiters.remove(end)


class _GenerateCall:
    """The subscription of one Generate call, and what is left to do when the call ends."""

    def __init__(self, runtime: Runtime, grace_ms: int) -> None:
        self.news = asyncio.Event()
        self.feed = Feed(self.news.set)
        self.grace_ms = grace_ms
        self._runtime = runtime
        self._live: LiveRequest | None = None

    def follow(self, live: LiveRequest) -> None:
        """From the first token on; handles are the numbers of the samples."""
        self._live = live
        live.stop_grace()
        self.feed.subscribe(live.output, 0, ())

    def end(self, places: Places) -> None:
        """The call is over, whatever ended it."""
        places.give_back()
        for subscription in list(self.feed.subscriptions.values()):
            self.feed.unsubscribe(subscription)
        if self._live is not None:
            self._runtime.abandon(self._live, self.grace_ms)
