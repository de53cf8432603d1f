"""A scheduler that does what a test tells it, behind real gRPC on a free port."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.server import Server
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc
from tests.gateway import tiny_model
from tests.gateway.scripted_runs import (
    Run,
    add_alternatives,
    body_of,
    failure,
    reply_at_once,
    scores_of,
)

WAIT_S = 60.0


class _Session:
    def __init__(self) -> None:
        self.outbox: asyncio.Queue[scheduler_pb2.OpenResponse | None] = asyncio.Queue()
        self.followed: dict[int, tuple[Run, list[int], list[bool]]] = {}
        self.is_mute = False

    def send(self, **fields: Any) -> None:
        if not self.is_mute:
            updates = scheduler_pb2.Updates(**fields)
            self.outbox.put_nowait(scheduler_pb2.OpenResponse(updates=updates))

    def publish(self, handle: int) -> None:
        run, cursors, told_ends = self.followed[handle]
        frame = generation_pb2.StepFrame()
        if run.request.HasField("prompt_scoring") and not any(cursors) and any(run.tokens):
            frame.prompt_scores.append(scores_of(run.request, handle))
        for sample, tokens in enumerate(run.tokens):
            for index in range(cursors[sample], len(tokens)):
                frame.handle.append(handle + sample)
                frame.index.append(index)
                frame.token_id.append(tokens[index])
                if run.request.sampling.logprobs:
                    frame.logprob.append(-float(index) - 0.5)
                    add_alternatives(frame, tokens[index], run.request.sampling.top_logprobs)
            cursors[sample] = len(tokens)
            end = run.ends[sample]
            if end is not None and not told_ends[sample]:
                told_ends[sample] = True
                frame.ends.add().CopyFrom(end)
                frame.ends[-1].handle = handle + sample
        finished = []
        if run.finished is not None:
            finished = [scheduler_pb2.Finished()]
            finished[0].CopyFrom(run.finished)
            finished[0].handle = handle
            del self.followed[handle]
        if frame.handle or frame.ends or finished:
            self.send(frame=frame, finished=finished)


class ScriptedScheduler(
    scheduler_pb2_grpc.SchedulerServiceServicer, scheduler_pb2_grpc.AdminServiceServicer
):
    """Serves the tiny models; every attribute may be changed while it runs."""

    def __init__(self) -> None:
        self.script: Callable[[Run], None] = reply_at_once
        self.refusal: generation_pb2.Failure | None = None
        self.is_deaf = False  # accepts nothing
        self.models = [tiny_model.BARE_NAME, tiny_model.NAME]
        self.runs: list[Run] = []
        self.cancelled: list[str] = []
        self.left: list[str] = []
        self.resumes: list[tuple[str, tuple[int, ...]]] = []
        self.port = 0
        self.num_opens = 0
        self.unanswered: list[tuple[_Session, scheduler_pb2.SubmitCommand]] = []
        self.num_asset_reads = 0
        self.num_look_ups = 0
        self.looks_up = asyncio.Event()  # answers to unary calls wait for it
        self.looks_up.set()
        self.num_submits = 0
        self.num_heartbeats = 0
        self.heartbeat_timeout_ms = 60_000  # as clients are told
        self.generation_config = b""
        self.chat_template = tiny_model.TEMPLATE
        self._sessions: list[_Session] = []
        self._news = asyncio.Condition()
        self._server = Server(
            max_message_bytes=1 << 26, max_concurrent_streams=1000, has_reflection=False
        )
        service = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"]
        self._server.register(
            service, scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, self
        )
        admin = scheduler_pb2.DESCRIPTOR.services_by_name["AdminService"]
        self._server.register(admin, scheduler_pb2_grpc.add_AdminServiceServicer_to_server, self)
        self.snapshot = scheduler_pb2.Snapshot()

    async def start(self, port: int = 0) -> int:
        return await self._server.start(f"127.0.0.1:{port}")

    async def stop(self) -> None:
        await self._server.stop(0)

    async def close_door(self) -> None:
        """Shut down, as far as its health says."""
        await self._server.set_serving(False)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to have happened here."""
        async with asyncio.timeout(WAIT_S), self._news:
            await self._news.wait_for(condition)

    async def run(self, number: int = 0) -> Run:
        """The n-th accepted run, once it is there."""
        await self.until(lambda: len(self.runs) > number)
        return self.runs[number]

    def publish(self) -> None:
        """Send everybody what is new in the runs that they follow."""
        for session in self._sessions:
            for handle in list(session.followed):
                session.publish(handle)

    def tell_positions(self, position: int) -> None:
        for session in self._sessions:
            for handle in session.followed:
                status = generation_pb2.QueueStatus(position=position)
                session.send(positions=[scheduler_pb2.Position(handle=handle, status=status)])

    def hear(self) -> None:
        """Answer what was not answered, late."""
        self.is_deaf = False
        for session, submit in self.unanswered:
            self._submit(session, submit)

    def drop_connections(self) -> None:
        for session in self._sessions:
            session.outbox.put_nowait(None)

    def mute(self) -> None:
        """Open connections stay open and say nothing any more."""
        for session in self._sessions:
            session.is_mute = True

    # --- SchedulerService ---

    async def Open(  # noqa: N802
        self, request_iterator: AsyncIterator[scheduler_pb2.OpenRequest], context: Any
    ) -> AsyncIterator[scheduler_pb2.OpenResponse]:
        session = _Session()
        self._sessions.append(session)
        reader = asyncio.create_task(self._read(session, request_iterator))
        self.num_opens += 1
        welcome = scheduler_pb2.ClientWelcome(epoch=self.num_opens)
        welcome.heartbeat_interval.FromMilliseconds(200)
        welcome.heartbeat_timeout.FromMilliseconds(self.heartbeat_timeout_ms)
        try:
            yield scheduler_pb2.OpenResponse(welcome=welcome)
            while (response := await session.outbox.get()) is not None:
                yield response
        finally:
            self._sessions.remove(session)
            reader.cancel()
        raise HeadwayError(Reason.DRAINING, "dropped by the test")

    async def _read(
        self, session: _Session, requests: AsyncIterator[scheduler_pb2.OpenRequest]
    ) -> None:
        async for request in requests:
            self.num_heartbeats += request.HasField("heartbeat")
            if request.HasField("heartbeat") and not session.is_mute:
                beat = scheduler_pb2.Heartbeat()
                session.outbox.put_nowait(scheduler_pb2.OpenResponse(heartbeat=beat))
            for submit in request.commands.submits:
                self._submit(session, submit)
            for resume in request.commands.resumes:
                self._resume(session, resume)
            for cancel in request.commands.cancels:
                self._cancel(session, cancel)
            async with self._news:
                self._news.notify_all()

    def _submit(self, session: _Session, submit: scheduler_pb2.SubmitCommand) -> None:
        self.num_submits += 1
        if self.is_deaf:
            self.unanswered.append((session, submit))
            return
        if self.refusal is not None:
            rejected = scheduler_pb2.Rejected(handle=submit.handle, failure=self.refusal)
            session.send(rejected=[rejected])
            return
        key = submit.request.idempotency_key
        run = next((one for one in self.runs if one.request.idempotency_key == key), None)
        if run is None:
            run = Run(f"run-{len(self.runs)}", submit.request)
            self.runs.append(run)
            self.script(run)
        elif key and body_of(run.request) != body_of(submit.request):
            conflict = failure(Reason.REQUEST_ID_CONFLICT)
            session.send(rejected=[scheduler_pb2.Rejected(handle=submit.handle, failure=conflict)])
            return
        self._accept(session, submit.handle, run)
        if not submit.detached:
            self._follow(session, submit.handle, run, ())

    def _resume(self, session: _Session, resume: scheduler_pb2.ResumeCommand) -> None:
        self.resumes.append((resume.request_id, tuple(resume.next_index)))
        if self.refusal is not None:
            rejected = scheduler_pb2.Rejected(handle=resume.handle, failure=self.refusal)
            session.send(rejected=[rejected])
            return
        run = next((one for one in self.runs if one.request_id == resume.request_id), None)
        if run is None:
            failure = generation_pb2.Failure(reason="REQUEST_NOT_FOUND", message="unknown")
            session.send(rejected=[scheduler_pb2.Rejected(handle=resume.handle, failure=failure)])
            return
        self._accept(session, resume.handle, run)
        self._follow(session, resume.handle, run, resume.next_index)

    def _accept(self, session: _Session, handle: int, run: Run) -> None:
        status = generation_pb2.QueueStatus(
            state=generation_pb2.QueueStatus.STATE_WAITING, position=3, depth=4
        )
        accepted = scheduler_pb2.Accepted(handle=handle, request_id=run.request_id, status=status)
        session.send(accepted=[accepted])

    def _follow(self, session: _Session, handle: int, run: Run, next_index: Sequence[int]) -> None:
        num_samples = len(run.tokens)
        cursors = [*next_index, *[0] * (num_samples - len(next_index))]
        session.followed[handle] = (run, cursors, [False] * num_samples)
        session.publish(handle)

    def _cancel(self, session: _Session, cancel: scheduler_pb2.CancelCommand) -> None:
        handle = cancel.handle
        if handle not in session.followed:
            return
        run = session.followed[handle][0]
        if cancel.leave:
            del session.followed[handle]
            self.left.append(run.request_id)
            return
        self.cancelled.append(run.request_id)
        run.finish(generation_pb2.Failure(reason="CANCELLED", message="cancelled"))
        session.publish(handle)

    async def Retrieve(  # noqa: N802
        self, request: scheduler_pb2.RetrieveRequest, context: Any
    ) -> scheduler_pb2.RetrieveResponse:
        run = next((one for one in self.runs if one.request_id == request.request_id), None)
        if run is None or run.request.tenant != request.tenant:
            raise HeadwayError(Reason.REQUEST_NOT_FOUND, "No such request.")
        if run.finished is None:
            pending = generation_pb2.QueueStatus(position=1)
            return scheduler_pb2.RetrieveResponse(pending=pending)
        samples = [generation_pb2.SampleResult(token_ids=tokens) for tokens in run.tokens]
        result = generation_pb2.GenerationResult(samples=samples, usage=run.finished.usage)
        return scheduler_pb2.RetrieveResponse(result=result)

    async def Cancel(  # noqa: N802
        self, request: scheduler_pb2.CancelRequest, context: Any
    ) -> scheduler_pb2.CancelResponse:
        self.cancelled.append(request.request_id)
        return scheduler_pb2.CancelResponse()

    async def _look_up(self) -> None:
        self.num_look_ups += 1
        async with self._news:
            self._news.notify_all()
        await self.looks_up.wait()

    async def GetSnapshot(  # noqa: N802
        self, request: scheduler_pb2.GetSnapshotRequest, context: Any
    ) -> scheduler_pb2.GetSnapshotResponse:
        await self._look_up()
        return scheduler_pb2.GetSnapshotResponse(snapshot=self.snapshot)

    async def ListModels(  # noqa: N802
        self, request: scheduler_pb2.ListModelsRequest, context: Any
    ) -> scheduler_pb2.ListModelsResponse:
        await self._look_up()
        cards = [tiny_model.card(name) for name in self.models]
        return scheduler_pb2.ListModelsResponse(models=cards)

    async def GetModel(  # noqa: N802
        self, request: scheduler_pb2.GetModelRequest, context: Any
    ) -> scheduler_pb2.GetModelResponse:
        await self._look_up()
        if request.model not in self.models:
            raise HeadwayError(Reason.MODEL_NOT_FOUND, "No such model.", field="model")
        response = tiny_model.response(request.model, request.known_assets_digest)
        if response.HasField("assets"):
            self.num_asset_reads += 1
            response.assets.generation_config_json = self.generation_config
            if response.assets.chat_template:
                response.assets.chat_template = self.chat_template
        return response
