"""An SSE answer. After its first byte an error is the last event.

Events have ids (``openai_place``), so a stream can be continued after any of them: all tokens are
read again from the first, for what follows depends on them, and told from there on. The way back is
GET /v1/requests/<request>/events at any gateway, with what x-headway-resume said, or the same
request again under its Idempotency-Key.
"""

import asyncio
from collections.abc import Iterator, Sequence

from starlette.types import Message, Scope, Send

from gateway_http.client import Event, Finish, Generation, SampleEnded, SampleEvent, Scored, Tokens
from gateway_http.http_errors import log_fault
from gateway_http.http_protocol import CONNECTION
from gateway_http.openai_echo import add_scores
from gateway_http.openai_job import Job, Samples, batches
from gateway_http.openai_output import Format
from gateway_http.stall_guard import StallGuard, StreamCutError
from headway.bell import Bell
from headway.errors import INTERNAL_MESSAGE, HeadwayError
from headway.reasons import Reason

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Stream:
    """One write for whatever came together; ``name`` stands in the ids of its events."""

    def __init__(
        self, job: Job, output: Format, name: str, write_timeout_s: float, scope: Scope, send: Send
    ) -> None:
        self._job = job
        self._output = output
        self._name = name
        self.guard = StallGuard(write_timeout_s, scope.get("state", {}).get(CONNECTION))
        self._send = send
        self._path = scope["path"]
        self._id_prefix = b"id: %b:" % name.encode() if job.is_resumable else b""
        self._num_before = 1 if job.spec.num_echo_chars else 0  # events before a choice's tokens
        num_choices = job.spec.num_choices
        self._told = [0] * num_choices  # by choice, as ids have it
        if job.resume_from is not None and not output.counts_events:
            self._told = list(job.resume_from.counts)
        self._counts = [b"%d" % count for count in self._told]
        self._unwritten: list[bytes] = []
        self._samples = Samples(job, [max(0, told - self._num_before) for told in self._told])

    async def run(
        self,
        generations: Sequence[Generation],
        changed: Bell,
        headers: Sequence[tuple[bytes, bytes]],
    ) -> None:
        """All of it, from the headers on. Raises StreamCutError."""
        try:
            start = {
                "type": "http.response.start",
                "status": 200,
                "headers": [*_SSE_HEADERS, *headers],
            }
            await self._send_in_time(start)
            await self._tell(generations, changed)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.guard.cause is None or task is None or task.uncancel():
                raise
            is_resumable = self._job.is_resumable and self._job.is_kept
            raise StreamCutError(self.guard.cause, self._name, is_resumable) from None
        finally:
            self.guard.close()

    async def _tell(self, generations: Sequence[Generation], changed: Bell) -> None:
        """All events; whatever goes wrong is the last one.

        What is there already when the stream begins goes out with its opening, and the end with
        what came last: a write is a packet, and wakes the client up.
        """
        num_live = len(generations)
        try:
            self._unwritten += (self._output.opening(self._job.resume_from), *self._plain_echoes())
            async for batch in batches(generations, changed):
                self._take(batch)
                num_live -= sum(isinstance(event, Finish) for _, event in batch)
                if num_live:
                    await self._write()
            self._unwritten.append(self._output.closing(self._samples.close()))
        except HeadwayError as error:
            log_fault(error, self._path)
            self._unwritten.append(self._output.failure(error))
        except Exception:
            failure = HeadwayError(Reason.INTERNAL, INTERNAL_MESSAGE)
            self._unwritten.append(self._output.failure(failure))
            await self._write(is_last=True)
            raise
        await self._write(is_last=True)

    def _take(self, batch: Sequence[tuple[int, Event]]) -> None:
        """Make events of it; raises the failure of a request after the tokens that came before."""
        error: HeadwayError | None = None
        for number, event in batch:
            if isinstance(event, SampleEvent):
                self._unwritten.append(self._encode(number, event))
            elif isinstance(event, Scored) and self._job.echoes:
                add_scores(self._job.echoes[number], event.scores)
                self._unwritten += self._echo(number)
            elif isinstance(event, Finish):
                try:
                    self._samples.finish(number, event)
                except HeadwayError as failure:
                    error = failure
        if error is not None:
            raise error

    def _encode(self, number: int, event: SampleEvent) -> bytes:
        index = self._samples.index(number, event.sample)
        if self._output.counts_events:
            events = [event] if isinstance(event, SampleEnded) else _one_by_one(event)
            deltas = (self._samples.push(index, one) for one in events)
            return b"".join(self._output.chunk(index, delta) for delta in deltas)
        delta = self._samples.push(index, event)
        count = self._num_before + self._samples.choices[index].num_tokens
        if isinstance(event, SampleEnded):
            count += 1
            if self._told[index] >= count:
                return b""  # this event was seen as well
        return self._with_id(index, count, self._output.chunk(index, delta))

    def _with_id(self, index: int, count: int, data: bytes) -> bytes:
        """A choice comes to this place by an event; ``data`` may turn out to be none."""
        if not (data and self._id_prefix):
            return data
        self._told[index] = count
        self._counts[index] = b"%d" % count
        return b"%b%b\n%b" % (self._id_prefix, b",".join(self._counts), data)

    def _plain_echoes(self) -> Iterator[bytes]:
        """Prompts that nothing is to be said about; the others wait for what is."""
        if not self._job.spec.wants_logprobs:
            for number in range(len(self._job.echoes)):
                yield from self._echo(number)

    def _echo(self, number: int) -> Iterator[bytes]:
        """To all samples of a prompt that were not told it yet."""
        echo = self._job.echoes[number]
        for sample in range(self._job.spec.num_samples):
            index = self._samples.index(number, sample)
            if not self._told[index]:
                yield self._with_id(index, 1, self._output.chunk(index, echo.as_delta()))

    async def _write(self, *, is_last: bool = False) -> None:
        data = b"".join(self._unwritten)
        self._unwritten.clear()
        if data or is_last:
            message = {"type": "http.response.body", "body": data, "more_body": not is_last}
            await self._send_in_time(message)

    async def _send_in_time(self, message: Message) -> None:
        guard = self.guard
        guard.num_writes += 1
        guard.is_writing = True
        await self._send(message)
        guard.is_writing = False


def _one_by_one(event: Tokens) -> Iterator[Tokens]:
    """So that the events which are told do not depend on how many tokens came at once."""
    num_tokens = len(event.token_ids)
    num_top = len(event.top_token_ids) // num_tokens
    for at in range(num_tokens):
        one, tops = slice(at, at + 1), slice(at * num_top, (at + 1) * num_top)
        yield Tokens(
            event.sample,
            event.first_index + at,
            event.token_ids[one],
            event.logprobs[one],
            event.top_token_ids[tops],
            event.top_logprobs[tops],
        )
