"""SchedulerService.Generate: one request on a call of its own."""

import asyncio
from collections.abc import AsyncIterator

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.requests import LiveRequest
from scheduler_svc.runtime import Runtime
from scheduler_svc.streams import Pulse
from scheduler_svc.subscriptions import Feed


class GenerateCall:
    """The subscription of one call. A caller that takes nothing for ``write_timeout_ms`` loses
    its request like one that hangs up, although its call cannot end before the write does."""

    def __init__(self, runtime: Runtime, pulse: Pulse, grace_ms: int) -> None:
        self._runtime = runtime
        self._pulse = pulse
        self._grace_ms = grace_ms
        self._news = asyncio.Event()
        self._feed = Feed(self._news.set)
        self._live: LiveRequest | None = None
        self._writing_since_ms: int | None = None
        self._is_cut = False

    async def follow(self, live: LiveRequest) -> AsyncIterator[scheduler.GenerateResponse]:
        """From acceptance to the end; handles are the numbers of the samples."""
        self._live = live
        live.stop_grace()
        self._feed.subscribe(live.output, 0, ())
        self._pulse.streams.add(self)
        async for response in self._responses(live):
            self._writing_since_ms = self._pulse.clock_ms()
            yield response
            self._writing_since_ms = None
            if self._is_cut:
                raise HeadwayError(Reason.NO_CAPACITY, "The peer took nothing for too long.")

    async def _responses(self, live: LiveRequest) -> AsyncIterator[scheduler.GenerateResponse]:
        settings = self._pulse.settings
        accepted = scheduler.Accepted(request_id=live.request_id, status=self._runtime.status(live))
        yield scheduler.GenerateResponse(accepted=accepted)
        while True:
            await self._news.wait()
            self._news.clear()
            updates = scheduler.Updates()
            self._feed.take(updates, settings.max_frame_tokens)
            if self._feed.has_news:  # the frame was full: there is more to take
                self._news.set()
            if updates.HasField("frame"):
                yield scheduler.GenerateResponse(frame=updates.frame)
            for finished in updates.finished:
                yield scheduler.GenerateResponse(finished=finished)
                return
            await asyncio.sleep(settings.generate_flush_ms / 1_000)

    def check_pulse(self, now_ms: int) -> None:
        """See HasPulse."""
        since_ms = self._writing_since_ms
        if since_ms is not None and now_ms - since_ms > self._pulse.settings.write_timeout_ms:
            self._is_cut = True
            self.end()

    def end(self) -> None:
        """Let go of the request; called when the call is over, whatever ended it."""
        self._pulse.streams.discard(self)
        for subscription in list(self._feed.subscriptions.values()):
            self._feed.unsubscribe(subscription)
        if self._live is not None:
            self._runtime.abandon(self._live, self._grace_ms)
            self._live = None
