"""A scheduler on a free port, with scripted peers that speak the real protocol over real gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio

from headway.errors import HeadwayError, from_rpc_error
from headway.server import connect
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import fleet_pb2_grpc, scheduler_pb2_grpc
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.process import Process, make_store, started
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.store.base import Store
from scheduler_svc.translate import duration

CARD = generation.ModelCard(
    name="tiny", family="qwen3", vocab_size=1_000, max_context_tokens=100, assets_digest="a1"
)
_STUCK_S = 10  # a test that waits for so long has failed
LENGTH = generation.FINISH_REASON_LENGTH
LOAD_MS = 50


def body(**overrides: Any) -> generation.GenerationRequest:
    """A small valid request; ``sampling`` may be a dict."""
    sampling = {"max_tokens": 4, **overrides.pop("sampling", {})}
    fields: dict[str, Any] = {"model": "tiny", "prompt_token_ids": [1, 2, 3], "tenant": "t"}
    fields.update(overrides)
    return generation.GenerationRequest(**fields, sampling=generation.SamplingParams(**sampling))


def held_lease(lease: fleet.LeaseRef, num_tokens: Sequence[int] = ()) -> fleet.HeldLease:
    """A lease of one sample that runs, as a hello lists it."""
    return fleet.HeldLease(lease=lease, num_tokens=num_tokens, model=CARD.name, num_slots=1)


async def read(call: Any) -> Any:
    """The next message that is no heartbeat. Raises HeadwayError, or EOFError."""
    try:
        async with asyncio.timeout(_STUCK_S):
            while (message := await call.read()) is not grpc.aio.EOF:
                if not message.HasField("heartbeat"):
                    return message
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    raise EOFError


async def write(call: Any, message: Any) -> None:
    """A call that is over already fails here instead of at the next read. Raises HeadwayError."""
    try:
        await call.write(message)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def until_error(call: Any) -> HeadwayError:
    """Read on until the stream ends with an error."""
    try:
        while True:
            await read(call)
    except HeadwayError as error:
        return error


class Executor:
    """An executor that does what the test says."""

    def __init__(self, channel: grpc.aio.Channel, executor_id: str = "e1") -> None:
        self._stub = fleet_pb2_grpc.FleetServiceStub(channel)
        self.executor_id = executor_id
        self.call: Any = None

    async def attach(
        self,
        *,
        num_slots: int = 4,
        models: Sequence[generation.ModelCard] = (CARD,),
        leases: Sequence[fleet.HeldLease] = (),
        max_models: int = 4,
        absent: Sequence[generation.ModelCard] = (),
        exactness_class: str = "",
        incarnation: str = "1",
        newer: bytes = b"",
    ) -> fleet.ExecutorWelcome:
        """``newer``: fields that the scheduler does not know."""
        self.call = self._stub.Attach()
        hello = fleet.ExecutorHello(
            executor_id=self.executor_id,
            incarnation=incarnation,
            capacity=fleet.Capacity(num_slots=num_slots, max_models=max_models),
            models=[
                *(
                    fleet.ModelOffer(card=card, resident=True, exactness_class=exactness_class)
                    for card in models
                ),
                *(fleet.ModelOffer(card=card, load_time=duration(LOAD_MS)) for card in absent),
            ],
            leases=leases,
        )
        hello.MergeFromString(newer)
        await self.send(hello=hello)
        message = await self.read()
        assert message.HasField("welcome")
        welcome: fleet.ExecutorWelcome = message.welcome
        return welcome

    async def send(self, **fields: Any) -> None:
        await write(self.call, fleet.AttachRequest(**fields))

    async def read(self) -> Any:
        return await read(self.call)

    async def grant(self) -> fleet.Grant:
        while True:
            orders = (await self.read()).orders
            if orders.grants:
                assert len(orders.grants) == 1
                return orders.grants[0]

    async def tokens(
        self, handle: int, tokens: Sequence[int], *, start: int = 0, end: bool = False, **more: Any
    ) -> None:
        num = len(tokens)
        frame = generation.StepFrame(
            handle=[handle] * num, index=range(start, start + num), token_id=tokens, **more
        )
        if end:
            frame.ends.add(handle=handle, num_tokens=start + num, reason=LENGTH)
        await self.send(report=fleet.ExecutorReport(frame=frame))

    async def end(
        self,
        lease: fleet.LeaseRef,
        num_tokens: Sequence[int] = (),
        outcome: Any = fleet.LeaseEnded.OUTCOME_COMPLETED,
        **more: Any,
    ) -> None:
        ended = fleet.LeaseEnded(lease=lease, outcome=outcome, num_tokens=num_tokens, **more)
        await self.send(report=fleet.ExecutorReport(ended=[ended]))

    async def run(self, grant: fleet.Grant, tokens: Sequence[int]) -> None:
        """A whole lease of one sample."""
        await self.tokens(grant.handle, tokens, end=True)
        await self.end(grant.lease, [len(tokens)])


class Client:
    """A client with one Open stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        self.call: Any = None
        self.tokens: dict[int, list[int]] = {}
        self.ends: list[generation.SequenceEnd] = []
        self.positions: list[scheduler.Position] = []

    async def open(self) -> scheduler.ClientWelcome:
        self.call = self.stub.Open()
        await self.send(hello=scheduler.ClientHello(client_id="test"))
        message = await self.read()
        assert message.HasField("welcome")
        welcome: scheduler.ClientWelcome = message.welcome
        return welcome

    async def send(self, **fields: Any) -> None:
        await write(self.call, scheduler.OpenRequest(**fields))

    async def command(self, **fields: Any) -> None:
        await self.send(commands=scheduler.ClientCommands(**fields))

    async def submit(self, handle: int = 0, **fields: Any) -> None:
        fields.setdefault("request", body())
        await self.command(submits=[scheduler.SubmitCommand(handle=handle, **fields)])

    async def resume(self, handle: int, request_id: str, next_index: Sequence[int] = ()) -> None:
        command = scheduler.ResumeCommand(
            handle=handle, request_id=request_id, tenant="t", next_index=next_index
        )
        await self.command(resumes=[command])

    async def read(self) -> Any:
        return await read(self.call)

    async def updates(self) -> scheduler.Updates:
        """The next updates; tokens are gathered by handle and checked for gaps."""
        updates: scheduler.Updates = (await self.read()).updates
        frame = updates.frame
        for handle, index, token in zip(frame.handle, frame.index, frame.token_id, strict=True):
            tokens = self.tokens.setdefault(handle, [])
            assert index == len(tokens)
            tokens.append(token)
        self.ends.extend(frame.ends)
        self.positions.extend(updates.positions)
        return updates

    async def accepted(self) -> scheduler.Accepted:
        return (await self.updates()).accepted[0]

    async def rejected(self) -> scheduler.Rejected:
        return (await self.updates()).rejected[0]

    async def until_token(self, num_tokens: int, handle: int = 0) -> None:
        while len(self.tokens.get(handle, ())) < num_tokens:
            await self.updates()

    async def finished(self) -> scheduler.Finished:
        while True:
            updates = await self.updates()
            if updates.finished:
                return updates.finished[0]


async def granted(
    executor: Executor, client: Client, handle: int = 0, **overrides: Any
) -> fleet.Grant:
    """The grant of a new request of this client; ``overrides`` as in ``body``."""
    await client.submit(handle=handle, request=body(**overrides))
    await client.accepted()
    return await executor.grant()


class World:
    """Channels are closed with it."""

    def __init__(self, process: Process, stack: contextlib.AsyncExitStack) -> None:
        self.process = process
        self._stack = stack
        self.channel: grpc.aio.Channel = None  # type: ignore[assignment]

    async def connect(self) -> grpc.aio.Channel:
        channel = connect(f"127.0.0.1:{self.process.port}", max_message_bytes=64 << 20)
        return await self._stack.enter_async_context(channel)

    def executor(self, executor_id: str = "e1") -> Executor:
        return Executor(self.channel, executor_id)

    def client(self) -> Client:
        return Client(self.channel)

    async def pair(self, executor_id: str = "e1", **attach: Any) -> tuple[Executor, Client]:
        """An executor that is attached (``Executor.attach``) and a client whose stream is open."""
        executor, client = self.executor(executor_id), self.client()
        await executor.attach(**attach)
        await client.open()
        return executor, client


@contextlib.asynccontextmanager
async def world(store: Store | None = None, **overrides: Any) -> AsyncIterator[World]:
    """A running scheduler."""
    values: dict[str, Any] = {"port": 0, "stop_grace_ms": 0, "generate_flush_ms": 0, **overrides}
    settings = SchedulerSettings(**values)
    async with (
        started(settings, store or make_store(settings)) as process,
        contextlib.AsyncExitStack() as stack,
    ):
        own = World(process, stack)
        own.channel = await own.connect()
        yield own
