"""A FleetService whose every word the test speaks."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from headway.server import Server
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import fleet_pb2_grpc
from headway.v1 import generation_pb2 as generation

TIMEOUT_S = 60.0


class Attachment:
    """One Attach call, as the scheduler sees it."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[fleet.AttachRequest | None] = asyncio.Queue()
        self.outbox: asyncio.Queue[fleet.AttachResponse | Exception | None] = asyncio.Queue()
        self.tokens: dict[int, list[int]] = {}  # by handle
        self.logprobs: dict[int, list[float]] = {}
        self.ends: dict[int, generation.SequenceEnd] = {}
        self.ended: dict[str, fleet.LeaseEnded] = {}
        self.hello = fleet.ExecutorHello()

    def welcome(
        self, *, timeout_ms: int = 10_000, orphan_grace_ms: int = 10_000, **fields: Any
    ) -> None:
        def duration(ms: int) -> Duration:
            return Duration(seconds=ms // 1000, nanos=ms % 1000 * 1_000_000)

        welcome = fleet.ExecutorWelcome(
            epoch=1,
            heartbeat_interval=duration(20),
            heartbeat_timeout=duration(timeout_ms),
            orphan_grace=duration(orphan_grace_ms),
            **fields,
        )
        self.outbox.put_nowait(fleet.AttachResponse(welcome=welcome))

    def order(self, **fields: Any) -> None:
        self.outbox.put_nowait(fleet.AttachResponse(orders=fleet.ExecutorOrders(**fields)))

    def close(self, error: Exception | None = None) -> None:
        """End the call, with OK or with an error."""
        self.outbox.put_nowait(error)

    async def next(self, kind: str) -> Any:
        """The next message of this kind; reports on the way are taken in. None: half-closed."""
        while True:
            async with asyncio.timeout(TIMEOUT_S):
                message = await self.inbox.get()
            if message is None:
                assert kind == "close"
                return None
            if message.HasField("report"):
                self._take(message.report)
            if message.WhichOneof("message") == kind:
                return getattr(message, kind)

    async def until_ended(self, request_id: str) -> fleet.LeaseEnded:
        while request_id not in self.ended:
            await self.next("report")
        return self.ended.pop(request_id)

    async def until_tokens(self, handle: int, count: int) -> None:
        while len(self.tokens.get(handle, ())) < count:
            await self.next("report")

    def _take(self, report: fleet.ExecutorReport) -> None:
        frame = report.frame
        assert len(frame.logprob) in (0, len(frame.handle))
        for i, handle in enumerate(frame.handle):
            self.tokens.setdefault(handle, []).append(frame.token_id[i])
            if frame.logprob:
                self.logprobs.setdefault(handle, []).append(frame.logprob[i])
        for end in frame.ends:
            self.ends[end.handle] = end
        for ended in report.ended:
            self.ended[ended.lease.request_id] = ended


class ScriptedScheduler(fleet_pb2_grpc.FleetServiceServicer):
    """Hands each Attach call to the test, its hello already read."""

    def __init__(self) -> None:
        self.attachments: asyncio.Queue[Attachment] = asyncio.Queue()
        self.address = ""
        self._server = Server(
            max_message_bytes=1 << 20, max_concurrent_streams=10, has_reflection=False
        )
        self._server.register(
            fleet.DESCRIPTOR.services_by_name["FleetService"],
            fleet_pb2_grpc.add_FleetServiceServicer_to_server,
            self,
        )

    async def start(self) -> None:
        port = await self._server.start("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(0)

    async def attached(self) -> Attachment:
        async with asyncio.timeout(TIMEOUT_S):
            attachment = await self.attachments.get()
        attachment.hello = await attachment.next("hello")
        return attachment

    async def welcomed(self, **fields: Any) -> Attachment:
        """The next one, which is told ``fields`` in its welcome."""
        attachment = await self.attached()
        attachment.welcome(**fields)
        return attachment

    async def Attach(  # noqa: N802
        self,
        request_iterator: AsyncIterator[fleet.AttachRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[fleet.AttachResponse]:
        await context.send_initial_metadata(())
        attachment = Attachment()
        self.attachments.put_nowait(attachment)
        reader = asyncio.create_task(self._read(request_iterator, attachment))
        try:
            while isinstance(message := await attachment.outbox.get(), fleet.AttachResponse):
                yield message
            if message is not None:
                raise message
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(
        self, request_iterator: AsyncIterator[fleet.AttachRequest], attachment: Attachment
    ) -> None:
        async for message in request_iterator:
            attachment.inbox.put_nowait(message)
        attachment.inbox.put_nowait(None)
