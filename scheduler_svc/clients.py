"""SchedulerService.Open: one session for each client process, with many requests on it."""

from collections.abc import Sequence
from typing import TypeGuard

import structlog

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc import translate
from scheduler_svc.catalog import Catalog
from scheduler_svc.checks import check_name
from scheduler_svc.positions import Positions
from scheduler_svc.requests import LiveRequest, Submission, SubmitSink
from scheduler_svc.runtime import Runtime
from scheduler_svc.streams import PeerStream, Pulse
from scheduler_svc.subscriptions import Feed

_MAX_HANDLE = (1 << 32) - 1

_log = structlog.get_logger()


def submission_from_proto(
    body: generation.GenerationRequest,
    catalog: Catalog,
    pulse: Pulse,
    sink: SubmitSink,
    *,
    is_detached: bool,
) -> Submission:
    """Check a request of a client. Raises HeadwayError."""
    card = catalog.card(body.model)
    request, own = translate.request_from_proto(body, card, pulse.settings)
    quota = None
    if body.HasField("quota"):
        quota = generation.Quota()
        quota.CopyFrom(body.quota)
    return Submission(request, own, card.vocab_size, is_detached, sink, quota)


class _StreamSubmit:
    """One submit on a stream, from its command to its answer."""

    def __init__(self, session: "ClientSession", command: scheduler.SubmitCommand) -> None:
        self._session = session
        self.handle = command.handle
        self.is_detached = command.detached
        self.wants_positions = command.wants_positions
        self.is_cancelled = False
        self.is_left = False

    def accepted(self, live: LiveRequest) -> None:
        """See SubmitSink."""
        self._session.on_accepted(self, live)

    def rejected(self, error: HeadwayError) -> None:
        """See SubmitSink."""
        self._session.on_rejected(self.handle, error)


class _Followed:
    """A request that a stream follows; the reader of its position."""

    __slots__ = ("_feed", "_handle", "_runtime", "last_position", "live")

    def __init__(self, runtime: Runtime, feed: Feed, handle: int, live: LiveRequest) -> None:
        self.live = live
        self._runtime = runtime
        self._feed = feed
        self._handle = handle
        self.last_position = -1

    def tell_position(self) -> bool:
        """See PositionReader."""
        status = self._runtime.status(self.live)
        if not _is_waiting(status):
            return False
        if status.position != self.last_position:
            self.last_position = status.position
            self._feed.tell_position(scheduler.Position(handle=self._handle, status=status))
        return True


class ClientSession(PeerStream[scheduler.OpenRequest, scheduler.OpenResponse]):
    """One Open stream."""

    def __init__(
        self,
        runtime: Runtime,
        catalog: Catalog,
        pulse: Pulse,
        positions: Positions,
    ) -> None:
        super().__init__(pulse)
        self._runtime = runtime
        self._catalog = catalog
        self._settings = pulse.settings
        self._positions = positions
        self.feed = Feed(self.wake)
        self._client_id: str | None = None
        self._welcome: scheduler.ClientWelcome | None = None
        self._last_handle = -1
        self._followed: dict[int, _Followed] = {}
        self._submits: dict[int, _StreamSubmit] = {}

    # --- from the client

    async def on_message(self, message: scheduler.OpenRequest) -> None:
        """See PeerStream."""
        kind = message.WhichOneof("message")
        if (kind == "hello") != (self._client_id is None):
            raise _out_of_turn("the first message is hello, and only the first")
        if kind == "hello":
            self._on_hello(message.hello)
        elif kind == "commands":
            await self._on_commands(message.commands)
            await self._runtime.room()
        elif kind is None:
            raise _out_of_turn("a message is empty")

    def _on_hello(self, hello: scheduler.ClientHello) -> None:
        check_name(hello.client_id, "client_id", self._settings.max_name_chars, may_be_empty=True)
        self._client_id = hello.client_id
        self._welcome = scheduler.ClientWelcome(
            epoch=self._runtime.epoch,
            heartbeat_interval=translate.duration(self._settings.heartbeat_interval_ms),
            heartbeat_timeout=translate.duration(self._settings.heartbeat_timeout_ms),
        )
        _log.info("client.attached", client_id=self._client_id)
        self.wake()

    async def _on_commands(self, commands: scheduler.ClientCommands) -> None:
        num_commands = len(commands.submits) + len(commands.resumes) + len(commands.cancels)
        if num_commands > self._settings.max_commands_per_message:
            raise _out_of_turn("too many commands in one message")
        for submit in commands.submits:
            self._on_submit(submit)
        for resume in commands.resumes:
            await self._on_resume(resume)
        for cancel in commands.cancels:
            self._on_cancel(cancel.handle, is_leaving=cancel.leave)

    def _on_submit(self, command: scheduler.SubmitCommand) -> None:
        self._take_handles(command.handle, max(1, command.request.num_samples))
        submit = _StreamSubmit(self, command)
        try:
            self._check_room()
            submission = submission_from_proto(
                command.request,
                self._catalog,
                self._pulse,
                submit,
                is_detached=command.detached,
            )
        except HeadwayError as error:
            self.on_rejected(command.handle, error)
            return
        self._submits[command.handle] = submit
        self._runtime.submit(submission)

    async def _on_resume(self, command: scheduler.ResumeCommand) -> None:
        self._take_handles(command.handle, 1)
        try:
            self._check_room()
            live = self._runtime.find(command.request_id, command.tenant)
            if live is None:
                live = await self._runtime.results.replay(command.request_id, command.tenant)
            translate.check_next_index(command.next_index, live.output)
        except HeadwayError as error:
            self.on_rejected(command.handle, error)
            return
        self._last_handle = _last_handle(command.handle, live.output.num_samples)
        self._answer(command.handle, live, self._runtime.status(live))
        self._follow(command.handle, live, command.next_index)

    def _on_cancel(self, handle: int, *, is_leaving: bool) -> None:
        if handle > self._last_handle:
            raise _out_of_turn(f"handle {handle} was never used")
        submit = self._submits.get(handle)
        if submit is not None:  # not answered yet
            submit.is_left |= is_leaving
            submit.is_cancelled |= not is_leaving
        elif (followed := self._followed.get(handle)) is not None:
            if is_leaving:
                self._leave(handle)
            else:
                self._runtime.cancel(followed.live)

    def _leave(self, handle: int) -> None:
        followed = self._followed.pop(handle)
        self._positions.remove(followed)
        self.feed.unsubscribe(self.feed.subscriptions[handle])
        self._runtime.abandon(followed.live, self._settings.resume_grace_ms)

    def _take_handles(self, handle: int, num_samples: int) -> None:
        if handle <= self._last_handle:
            raise _out_of_turn(f"handle {handle} is not above the last one, {self._last_handle}")
        self._last_handle = _last_handle(handle, num_samples)

    def _check_room(self) -> None:
        num_open = len(self.feed.subscriptions) + len(self._submits)
        if num_open >= self._settings.max_subscriptions_per_stream:
            raise HeadwayError(Reason.QUOTA_EXCEEDED, "Too many requests on this stream.")

    # --- answers

    def on_accepted(self, submit: _StreamSubmit, live: LiveRequest) -> None:
        """A submit of this stream is in our care."""
        del self._submits[submit.handle]
        needs_status = submit.is_detached or submit.wants_positions
        status = self._runtime.status(live) if needs_status else None
        # one that an executor has been given already has news soon, and nobody waits for this
        can_wait = not needs_status and bool(live.output.attempts.executor_id)
        self._answer(submit.handle, live, status, can_wait=can_wait)
        if submit.is_cancelled:
            self._runtime.cancel(live)
        if submit.is_detached:
            return
        if self._has_ended or submit.is_left:
            self._runtime.abandon(live, self._settings.resume_grace_ms)
            return
        followed = self._follow(submit.handle, live, ())
        if submit.wants_positions and _is_waiting(status):
            followed.last_position = status.position
            self._positions.add(followed)

    def on_rejected(self, handle: int, error: HeadwayError) -> None:
        """A submit or resume of this stream was refused."""
        self._submits.pop(handle, None)
        self.feed.reject(scheduler.Rejected(handle=handle, failure=translate.failure(error)))

    def _answer(
        self,
        handle: int,
        live: LiveRequest,
        status: generation.QueueStatus | None,
        *,
        can_wait: bool = False,
    ) -> None:
        accepted = scheduler.Accepted(handle=handle, request_id=live.request_id, status=status)
        self.feed.accept(accepted, can_wait=can_wait)
        if can_wait:
            self.wake_within(self._settings.accept_linger_ms)

    def _follow(self, handle: int, live: LiveRequest, next_index: Sequence[int]) -> _Followed:
        live.stop_grace()
        followed = self._followed[handle] = _Followed(self._runtime, self.feed, handle, live)
        self.feed.subscribe(live.output, handle, next_index)
        return followed

    # --- the stream

    def take(self) -> scheduler.OpenResponse | None:
        """See PeerStream."""
        if self._welcome is not None:
            welcome, self._welcome = self._welcome, None
            return scheduler.OpenResponse(welcome=welcome)
        if not self.feed.has_news:
            return None
        response = scheduler.OpenResponse()
        self.feed.take(response.updates, self._settings.max_frame_tokens)
        for finished in response.updates.finished:
            self._positions.remove(self._followed.pop(finished.handle))
        return response

    def num_answers(self) -> int:
        """See PeerStream."""
        return self.feed.num_answers

    def heartbeat(self) -> scheduler.OpenResponse | None:
        """See PeerStream."""
        if self._client_id is None:
            return None
        return scheduler.OpenResponse(heartbeat=scheduler.Heartbeat())

    def on_end(self) -> None:
        """See PeerStream."""
        if self._client_id is not None:
            _log.info(
                "client.lost",
                client_id=self._client_id,
                num_followed=len(self._followed),
                error=self._error.message if self._error is not None else None,
            )
        for handle in list(self._followed):
            self._leave(handle)


def _is_waiting(status: generation.QueueStatus | None) -> TypeGuard[generation.QueueStatus]:
    return status is not None and status.state == generation.QueueStatus.STATE_WAITING


def _last_handle(handle: int, num_samples: int) -> int:
    """Of the handles that a request takes."""
    last = handle + max(1, num_samples) - 1
    if last > _MAX_HANDLE:
        raise _out_of_turn("the handles of this stream are used up")
    return last


def _out_of_turn(message: str) -> HeadwayError:
    return HeadwayError(Reason.INVALID_REQUEST, message)
