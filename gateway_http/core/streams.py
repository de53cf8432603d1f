"""The gateway's side of the Open stream: which requests live, and how far each one is.

Rule: each consumer sees every token of a request once, in order, and one end, however often the
connection breaks. No I/O, no clock: the shell says what happened and carries ``Commands`` out.

A frame is compared with what was delivered: overlap that agrees is dropped, overlap that differs
ends the request, because two sample paths are never joined. A gap means that something was lost:
the request is resumed from its next index under a new handle, and whatever still arrives under
the old one has no meaning. After a broken connection, what was accepted is resumed; what was not
is submitted again, which its idempotency key makes safe.
"""

from collections.abc import Callable
from typing import Any

from gateway_http.core.frames import Frame, take_frame
from gateway_http.core.handles import Handles
from gateway_http.core.messages import (
    Accepted,
    Cancel,
    Commands,
    Ended,
    Failure,
    Positioned,
    Resume,
    Sample,
    SampleEnded,
    Scored,
    Stream,
    Submit,
)
from headway.reasons import Reason


class Streams:
    """All requests of one gateway, and the commands that wait for the connection.

    A stream is resumed at most ``max_resumes`` times without a new token.
    """

    def __init__(self, max_resumes: int) -> None:
        self._max_resumes = max_resumes
        self._live: dict[int, Stream] = {}
        self._handles = Handles()
        self._outbox: dict[int, Stream] = {}  # by key: to be submitted or resumed
        self._cancels: list[Cancel] = []
        self._next_key = 1
        self._is_connected = False

    def __len__(self) -> int:
        return len(self._live)

    @property
    def is_exhausted(self) -> bool:
        """This connection has no handles left: open a new one."""
        return self._handles.are_exhausted

    @property
    def has_commands(self) -> bool:
        """``take`` would give something."""
        return bool(self._outbox or self._cancels)

    # --- the consumer's side ---

    def open(
        self,
        payload: Any,
        *,
        num_samples: int,
        num_bytes: int,
        on_change: Callable[[], None],
        request_id: str = "",
        is_detached: bool = False,
        is_kept: bool = False,
        wants_positions: bool = False,
        wants_logprobs: bool = False,
    ) -> Stream:
        """Ask for a request; ``on_change`` is called whenever ``Stream.read`` has news.

        ``request_id``: it was accepted before, follow it. ``is_kept`` says that it has a name by
        which its client may come back for it.
        """
        stream = Stream(
            key=self._next_key,
            payload=payload,
            num_samples=num_samples,
            num_bytes=num_bytes,
            is_detached=is_detached,
            is_kept=is_kept or is_detached,
            wants_positions=wants_positions,
            wants_logprobs=wants_logprobs,
            on_change=on_change,
            samples=[Sample() for _ in range(num_samples)],
            request_id=request_id,
            is_followed=bool(request_id),
        )
        self._next_key += 1
        self._live[stream.key] = stream
        if self._is_connected:
            self._outbox[stream.key] = stream
        return stream

    def cancel(self, stream: Stream, failure: Failure | None = None) -> None:
        """End a request for its consumer now, and for the scheduler as soon as it can be told.

        One that is kept goes on in the scheduler: its key leads back to it.
        """
        if stream.ended is None:
            self._end(stream, failure or Failure(Reason.CANCELLED, "The client went away."))

    def fail_all(self, failure: Failure) -> None:
        """End everything that is not finished."""
        for stream in list(self._live.values()):
            self.cancel(stream, failure)

    # --- the connection's side ---

    def connected(self) -> None:
        """A new connection has been welcomed: put everything that lives onto it."""
        assert not self._is_connected
        self._is_connected = True
        self._outbox.update(self._live)

    def disconnected(self) -> None:
        """The connection is gone, and with it all handles and unsent commands."""
        self._is_connected = False
        self._handles.clear()
        self._outbox.clear()
        self._cancels.clear()
        for stream in list(self._live.values()):
            stream.handle = 0
            if stream.is_cancelled and not stream.request_id:
                del self._live[stream.key]  # the scheduler's resume grace ends it, if it is there

    def take(self, max_bytes: int) -> Commands:
        """What has gathered, about ``max_bytes`` of it at most.

        Handles are given out here, in the order in which the scheduler reads the message.
        """
        taken: list[Stream] = []
        num_bytes = 0
        while self._outbox and num_bytes < max_bytes:
            stream = self._outbox.pop(next(iter(self._outbox)))
            num_bytes += stream.num_bytes
            taken.append(stream)
        commands = Commands(cancels=self._cancels)
        self._cancels = []
        for stream in taken:
            if not stream.request_id:
                handle = self._handles.assign(stream)
                commands.submits.append(
                    Submit(handle, stream.payload, stream.is_detached, stream.wants_positions)
                )
        for stream in taken:
            if stream.request_id:
                handle = self._handles.assign(stream)
                next_index = tuple(len(sample.token_ids) for sample in stream.samples)
                commands.resumes.append(
                    Resume(handle, stream.request_id, stream.payload, next_index)
                )
                if stream.is_cancelled:
                    commands.cancels.append(Cancel(handle))
        return commands

    def on_accepted(self, handle: int, request_id: str, status: Any) -> None:
        """The scheduler has it. A detached request needs nothing more from this stream."""
        stream = self._handles.stream(handle)
        if stream is None:
            return
        is_first = not stream.is_accepted
        stream.is_accepted = True
        stream.request_id = request_id
        if stream.is_detached:
            self._forget(stream)
        if stream.ended is not None:
            return
        if is_first:
            stream.unread = Accepted(request_id, status)
            stream.on_change()
        elif stream.wants_positions:
            self.on_position(handle, status)

    def on_rejected(self, handle: int, failure: Failure) -> bool:
        """Refused. True: this scheduler is not the one to ask, so try another connection."""
        stream = self._handles.stream(handle)
        if stream is None:
            return False
        is_resume = bool(stream.request_id)
        if failure.reason is Reason.NOT_LEADER or (
            is_resume and failure.reason is Reason.DRAINING and not stream.is_cancelled
        ):
            self._handles.release(stream)
            return True
        lost = is_resume and failure.reason is Reason.REQUEST_NOT_FOUND
        can_begin_anew = not (stream.is_followed or stream.num_tokens or stream.is_cancelled)
        if lost and can_begin_anew and self._may_retry(stream):
            # Accepted in memory only, and forgotten: nothing was delivered, so begin anew.
            self._handles.release(stream)
            stream.request_id = ""
            stream.is_accepted = False
            self._outbox[stream.key] = stream
            return False
        if lost and not stream.is_followed:
            # the client that sent it has not asked for anything that is not there
            message = "The scheduler was restarted, and has lost this request: send it again."
            failure = Failure(Reason.NO_CAPACITY, message)
        self._finish(stream, Ended(failure))
        return False

    def on_position(self, handle: int, status: Any) -> None:
        """It still waits. Never hides an acceptance that was not read yet."""
        stream = self._handles.stream(handle)
        if stream is None or stream.ended is not None:
            return
        if isinstance(stream.unread, Accepted):
            stream.unread = Accepted(stream.unread.request_id, status)
        else:
            stream.unread = Positioned(status)
        stream.on_change()

    def on_scores(self, handle: int, scores: Any) -> None:
        """What the model thinks of a prompt; said again after every resume."""
        stream = self._handles.stream(handle)
        if stream is not None and stream.scored is None and stream.ended is None:
            stream.scored = Scored(scores)
            stream.on_change()

    def on_frame(self, frame: Frame) -> None:
        """Tokens of many requests."""
        samples = self._handles.samples
        for stream in take_frame(frame, samples, self._resume, self._diverge):
            stream.on_change()

    def on_finished(self, handle: int, failure: Failure | None, detail: Any) -> None:
        """The request's end; one that lacks tokens is a gap like any other."""
        stream = self._handles.stream(handle)
        if stream is None:
            return
        is_complete = all(sample.end is not None for sample in stream.samples)
        if failure is None and not is_complete and not stream.is_cancelled:
            self._resume(stream)
        else:
            self._finish(stream, Ended(failure, detail))

    # --- inside ---

    def _forget(self, stream: Stream) -> None:
        self._handles.release(stream)
        self._outbox.pop(stream.key, None)
        del self._live[stream.key]

    def _finish(self, stream: Stream, ended: Ended) -> None:
        """The scheduler is done with it; the consumer may have been told an end before."""
        self._forget(stream)
        if stream.ended is None:
            stream.ended = ended
            stream.on_change()

    def _end(self, stream: Stream, failure: Failure) -> None:
        """We are done with it; it stays until the scheduler confirms, unless it never heard."""
        stream.ended = Ended(failure)
        stream.is_cancelled = True
        for number, sample in enumerate(stream.samples):
            if sample.end is None:  # closed: takes no more tokens, and tells nobody
                sample.end = SampleEnded(number, None)
                sample.is_end_read = True
        if stream.key in self._live:
            is_unsent = stream.key in self._outbox or not self._is_connected
            if stream.is_kept or (is_unsent and not stream.request_id):
                if stream.handle and not stream.is_detached:
                    self._cancels.append(Cancel(stream.handle, is_leaving=True))
                self._forget(stream)
            elif stream.handle:
                self._cancels.append(Cancel(stream.handle))
        stream.on_change()

    def _may_retry(self, stream: Stream) -> bool:
        if stream.num_tokens > stream.num_tokens_at_resume:
            stream.num_resumes = 0
        stream.num_tokens_at_resume = stream.num_tokens
        stream.num_resumes += 1
        return stream.num_resumes <= self._max_resumes

    def _resume(self, stream: Stream) -> None:
        if stream.is_cancelled:
            return
        if not stream.request_id or not self._may_retry(stream):
            self._end(stream, Failure(Reason.INTERNAL, "Tokens of this stream were lost."))
            return
        self._handles.release(stream)
        self._outbox[stream.key] = stream

    def _diverge(self, stream: Stream) -> None:
        if not stream.is_cancelled:
            self._end(stream, Failure(Reason.INTERNAL, "The stream diverged after a failover."))
