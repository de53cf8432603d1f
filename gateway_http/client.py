"""The scheduler as the gateway's handlers see it: submit, follow, retrieve, cancel, look up.

Everything that has to do with requests travels on one Open stream (``connection``); look-ups are
unary calls to the same scheduler. Nothing here waits without a bound: a scheduler that is gone
is NO_CAPACITY after ``submit_timeout_s`` or ``unary_timeout_s``.
"""

import asyncio
import contextlib
import itertools
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Self, TypeVar

import grpc.aio
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2

from gateway_http.cancellation import is_cancelled
from gateway_http.connection import Connection, Stubs
from gateway_http.core.messages import Accepted, Failure, Positioned, SampleEnded, Scored, Tokens
from gateway_http.core.streams import Streams
from gateway_http.generation import Event, Finish, Generation, SampleEvent
from gateway_http.models import LoadedModel, Models
from gateway_http.settings import GatewaySettings
from gateway_http.translate import unreachable
from headway.bell import Bell
from headway.errors import HeadwayError, from_rpc_error
from headway.reasons import Reason
from headway.v1 import generation_pb2, scheduler_pb2

__all__ = ["Accepted", "Event", "Finish", "Generation", "LoadedModel", "Positioned"]
__all__ += ["SampleEnded", "SampleEvent", "SchedulerClient", "Scored", "Tokens"]

T = TypeVar("T")

_SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name


class SchedulerClient:
    """One gateway's door to the scheduler. Run ``run`` as a task, or use ``running``."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._streams = Streams(settings.max_resumes)
        self._connection = Connection(self._streams, settings)
        self._models = Models(self._get_model, settings)
        self._own_keys = f"gateway-{secrets.token_hex(16)}"  # nobody else can guess one
        self._num_own_keys = itertools.count(1)
        self.draining = asyncio.Event()
        """Set when new requests are refused, and nobody should be held any more."""

    @property
    def is_connected(self) -> bool:
        """Whether a scheduler has welcomed us."""
        return self._connection.is_ready

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self.draining.is_set()

    @property
    def num_inflight(self) -> int:
        """Requests that this gateway follows now."""
        return len(self._streams)

    async def run(self) -> None:
        """Stay connected until cancelled; then everything that is followed ends."""
        try:
            await self._connection.run()
        finally:
            self.fail_all()
            self._models.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """``run`` for the length of a block; if it dies, so does the block."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.run())
            yield self
            task.cancel()

    def drain(self) -> None:
        """Take nothing new from here on."""
        self.draining.set()

    def fail_all(self) -> None:
        """End everything that is followed with DRAINING."""
        self._streams.fail_all(Failure(Reason.DRAINING, "This gateway is shutting down."))
        self._connection.wake()

    def generate(
        self,
        request: generation_pb2.GenerationRequest,
        *,
        wants_positions: bool = False,
        is_detached: bool = False,
        is_kept: bool = False,
        changed: Bell | None = None,
    ) -> Generation:
        """Submit and follow; a missing idempotency key is filled in, so that we may resubmit.

        ``is_kept``: the key is its client's own. Whoever repeats it gets the same request, so it
        is not cancelled when this reader leaves, or a repeated call would find it cancelled.
        ``changed`` lets one task wait for several generations at once: it polls all of them.
        Raises at once when this gateway is full or shutting down, or the request is too large.
        """
        self._check_room()
        if not request.idempotency_key:
            request.idempotency_key = f"{self._own_keys}-{next(self._num_own_keys)}"
        num_bytes = request.ByteSize()
        if num_bytes > self._settings.max_request_bytes:
            raise HeadwayError(Reason.BODY_TOO_LARGE, "The request is too large.")
        generation = self._generation(changed)
        stream = self._streams.open(
            request,
            num_samples=request.num_samples or 1,
            num_bytes=num_bytes,
            on_change=generation.on_change,
            is_detached=is_detached,
            is_kept=is_kept,
            wants_positions=wants_positions,
            wants_logprobs=request.sampling.logprobs,
        )
        generation.start(stream)
        self._connection.wake()
        return generation

    def follow(
        self,
        request_id: str,
        tenant: str,
        *,
        num_samples: int,
        wants_logprobs: bool = False,
        changed: Bell | None = None,
    ) -> Generation:
        """Follow an accepted request from its first token on, whoever submitted it.

        It is kept: leaving does not end it before the scheduler's resume grace. Its events end with
        REQUEST_NOT_FOUND if the tenant has no such request, RESULT_EXPIRED if it is gone.
        """
        self._check_room()
        generation = self._generation(changed)
        stream = self._streams.open(
            generation_pb2.GenerationRequest(tenant=tenant),
            request_id=request_id,
            num_samples=num_samples,
            num_bytes=len(request_id) + len(tenant),
            on_change=generation.on_change,
            is_kept=True,
            wants_logprobs=wants_logprobs,
        )
        generation.start(stream)
        self._connection.wake()
        return generation

    def _check_room(self) -> None:
        if self.is_draining:
            raise HeadwayError(Reason.DRAINING, "This gateway is shutting down.")
        if len(self._streams) >= self._settings.max_inflight:
            raise HeadwayError(Reason.NO_CAPACITY, "This gateway follows too many requests.")

    def _generation(self, changed: Bell | None) -> Generation:
        return Generation(
            self._streams,
            self._connection.wake,
            self._settings.submit_timeout_s,
            self._connection.loop,
            changed or self.bell(),
        )

    def bell(self) -> Bell:
        """For a task that waits for generations."""
        return Bell(self._connection.loop)

    async def submit(self, request: generation_pb2.GenerationRequest) -> Accepted:
        """Hand over a future; ``retrieve`` reads it. Raises what the scheduler refuses.

        Without an answer in time it may have been taken all the same: it is not cancelled, and
        a repeated call with its key gets its id.
        """
        return await self.generate(request, is_detached=True).accepted()

    async def retrieve(
        self, request_id: str, tenant: str, wait_s: float = 0.0
    ) -> generation_pb2.QueueStatus | generation_pb2.GenerationResult:
        """A future's result, or where it stands after ``wait_s``."""
        request = scheduler_pb2.RetrieveRequest(request_id=request_id, tenant=tenant)
        if wait_s > 0:
            request.wait.CopyFrom(_duration(wait_s))
        response = await self._call(lambda on, t: on.scheduler.Retrieve(request, timeout=t), wait_s)
        if response.HasField("result"):
            return response.result
        return response.pending

    async def wait_finished(
        self, tenant: str, group: str, cursor: int, wait_s: float = 0.0
    ) -> scheduler_pb2.WaitFinishedResponse:
        """Which of a group's requests have ended since ``cursor``; waits for one if none has."""
        request = scheduler_pb2.WaitFinishedRequest(tenant=tenant, group=group, cursor=cursor)
        if wait_s > 0:
            request.wait.CopyFrom(_duration(wait_s))
        return await self._call(lambda on, t: on.scheduler.WaitFinished(request, timeout=t), wait_s)

    async def cancel(self, request_id: str, tenant: str) -> None:
        """End a future wherever it is; finished and unknown ones are left as they are."""
        request = scheduler_pb2.CancelRequest(request_id=request_id, tenant=tenant)
        await self._call(lambda on, t: on.scheduler.Cancel(request, timeout=t))

    async def list_models(self) -> list[generation_pb2.ModelCard]:
        """The models that can be asked for now."""
        request = scheduler_pb2.ListModelsRequest()
        response = await self._call(lambda on, t: on.scheduler.ListModels(request, timeout=t))
        return list(response.models)

    async def takes_work(self) -> bool:
        """Whether the scheduler takes new requests: it says no as soon as it shuts down."""
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        response = await self._call(lambda on, t: on.health.Check(request, timeout=t))
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def snapshot(self) -> scheduler_pb2.Snapshot:
        """Queue and fleet at one instant, for the monitor."""
        request = scheduler_pb2.GetSnapshotRequest()
        response = await self._call(lambda on, t: on.admin.GetSnapshot(request, timeout=t))
        return response.snapshot

    async def model(self, name: str) -> LoadedModel:
        """A model's card and its tokenizer, cached. Raises MODEL_NOT_FOUND."""
        return await self._models.get(name)

    async def _get_model(self, name: str, digest: str) -> scheduler_pb2.GetModelResponse:
        request = scheduler_pb2.GetModelRequest(model=name, known_assets_digest=digest)
        return await self._call(lambda on, t: on.scheduler.GetModel(request, timeout=t))

    async def _call(self, call: Callable[[Stubs, float], Awaitable[T]], wait_s: float = 0.0) -> T:
        """A unary call, repeated while the scheduler is away: all of them are safe to retry."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.unary_timeout_s
        while True:
            stubs = await self._connection.stubs(max(0.0, deadline - loop.time()))
            try:
                return await call(stubs, wait_s + self._settings.unary_timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or loop.time() >= deadline:
                    raise from_rpc_error(error) from None
            except asyncio.CancelledError:
                # grpc.aio raises it also where the channel was closed under the call
                if is_cancelled():
                    raise
                if loop.time() >= deadline:
                    raise unreachable() from None
            pause_ms = self._settings.reconnect_backoff_min_ms * random.uniform(1, 4)  # noqa: S311
            await asyncio.sleep(pause_ms / 1000)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration
