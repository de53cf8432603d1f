"""Runs one OpenAI request to its end: waits, streams or collects, and stops when nobody listens.

Headers go out after every prompt was accepted, so a refusal has its real status. Afterwards an
error is the last event of a stream.

A stream of one choice can be continued: its events have ids ("<request>:<tokens>", and one more for
the end), and what was seen is skipped. The way back is GET /v1/requests/<request>/events at any
gateway, with what x-headway-resume said, or the same request again under its Idempotency-Key. A
reader that hangs up cancels its work, unless that has a key: then it may come back.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial

from starlette.types import Message, Scope, Send

from gateway_http.client import (
    Event,
    Finish,
    Generation,
    SampleEnded,
    SchedulerClient,
    Scored,
    Tokens,
)
from gateway_http.http_protocol import ABORT, DEPARTURE, Departure
from gateway_http.openai_choice import Choice, Delta
from gateway_http.openai_echo import add_scores
from gateway_http.openai_job import RESUME_HEADER, Job
from gateway_http.openai_output import Format
from gateway_http.openai_usage import Outcome
from gateway_http.settings import GatewaySettings
from gateway_http.stall_guard import StallGuard
from headway.errors import INTERNAL_MESSAGE, HeadwayError
from headway.reasons import Reason

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_MAX_STATE_BYTES = 4_096  # some clients take no longer headers; long stop strings make it long


async def serve(
    job: Job,
    client: SchedulerClient,
    settings: GatewaySettings,
    scope: Scope,
    send: Send,
) -> None:
    """Submit, wait for acceptance, answer. Raises HeadwayError before the first byte only."""
    with contextlib.ExitStack() as stack:
        changed = asyncio.Event()
        generations: list[Generation] = []
        for generation in job.start(client, changed):
            stack.callback(generation.cancel)
            generations.append(generation)
        departure: Departure = scope.get("state", {}).get(DEPARTURE) or Departure()
        departure.listen(partial(_cancel, generations))
        stack.callback(departure.ignore)
        accepted = [await generation.accepted() for generation in generations]
        request_id = accepted[0].request_id
        if job.resume_from is not None and job.resume_from[0] != request_id:
            # Its key was forgotten: what runs now is another draw, never to be joined to it.
            message = "The stream of this Last-Event-ID is gone: begin anew without it."
            raise HeadwayError(Reason.RESULT_EXPIRED, message, field="Last-Event-ID")
        output = job.make_format(request_id, job.spec, job.text)
        if not job.is_streaming:
            body = await _collect(job, output, generations, changed)
            await _send_body(send, body, _headers(job, request_id))
            return
        stream = _Stream(job, output, settings.stream_write_timeout_s, scope, send)
        await stream.run(generations, changed, request_id)


def _cancel(generations: Sequence[Generation]) -> None:
    """The client hung up: the work ends within one step."""
    for generation in generations:
        generation.cancel()


async def _batches(
    generations: Sequence[Generation], changed: asyncio.Event
) -> AsyncIterator[list[tuple[int, Event]]]:
    """What all generations have to tell, with their numbers, as it comes, to their ends."""
    live = dict(enumerate(generations))
    changed.set()  # there may be news that came with the acceptance
    while live:
        await changed.wait()
        changed.clear()
        batch = [(number, event) for number, one in live.items() for event in one.poll()]
        for number, event in batch:
            if isinstance(event, Finish):
                del live[number]
        if batch:
            yield batch


class _Samples:
    """The choices of a job, in the order of their indexes, and what they add up to."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.choices: list[Choice] = job.choices()
        self.outcome = Outcome(job.num_hidden)

    def index(self, number: int, sample: int = 0) -> int:
        """Of a prompt's sample among all choices."""
        return number * self._job.spec.num_samples + sample

    def push(self, index: int, event: Tokens | SampleEnded) -> Delta:
        """What the choice gained."""
        choice = self.choices[index]
        if isinstance(event, Tokens):
            delta = choice.push(event)
            return Delta() if self._job.num_hidden else delta
        delta = choice.finish(event.detail)
        return Delta(finish_reason="length") if self._job.num_hidden else delta

    def finish(self, number: int, event: Finish) -> None:
        """A prompt has ended. Raises its failure."""
        if event.error is not None:
            raise event.error
        self.outcome.add(number, event)

    def close(self) -> Outcome:
        """All have ended."""
        tokens = (choice.num_reasoning_tokens for choice in self.choices)
        self.outcome.num_reasoning_tokens = sum(tokens)
        return self.outcome


async def _collect(
    job: Job, output: Format, generations: Sequence[Generation], changed: asyncio.Event
) -> bytes:
    samples = _Samples(job)
    deltas = [Delta() for _ in samples.choices]
    async for batch in _batches(generations, changed):
        for number, event in batch:
            if isinstance(event, Tokens | SampleEnded):
                index = samples.index(number, event.sample)
                deltas[index].extend(samples.push(index, event))
            elif isinstance(event, Scored) and job.echoes:
                add_scores(job.echoes[number], event.scores)
            elif isinstance(event, Finish):
                samples.finish(number, event)
    if job.echoes:
        deltas = [_with_echo(job, number, delta) for number, delta in enumerate(deltas)]
    return output.body(deltas, samples.close())


def _with_echo(job: Job, index: int, delta: Delta) -> Delta:
    whole = job.echoes[index // job.spec.num_samples].as_delta()
    whole.extend(delta)
    return whole


def _headers(job: Job, request_id: str) -> list[tuple[bytes, bytes]]:
    own_id = request_id.encode()
    headers = [
        (b"x-request-id", job.caller_id.encode() or own_id),
        (b"x-headway-request-id", own_id),
    ]
    if job.is_streaming and job.is_resumable:
        state = job.resume_state().encode()
        if len(state) <= _MAX_STATE_BYTES:
            headers.append((RESUME_HEADER.encode(), state))
    return headers


async def _send_body(send: Send, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Stream:
    """An SSE answer: one write for whatever came together."""

    def __init__(
        self, job: Job, output: Format, write_timeout_s: float, scope: Scope, send: Send
    ) -> None:
        self._job = job
        self._output = output
        self._guard = StallGuard(write_timeout_s, scope.get("state", {}).get(ABORT))
        self._time = asyncio.get_running_loop().time
        self._send = send
        self._samples = _Samples(job)
        self._id_prefix = b""

    async def run(
        self, generations: Sequence[Generation], changed: asyncio.Event, request_id: str
    ) -> None:
        headers = [*_SSE_HEADERS, *_headers(self._job, request_id)]
        if self._job.is_resumable:
            self._id_prefix = b"id: %b:" % request_id.encode()
        try:
            start = {"type": "http.response.start", "status": 200, "headers": headers}
            await self._send_in_time(start)
            await self._tell(generations, changed)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._guard.has_stalled or task is None or task.uncancel():
                raise
            # The client takes nothing: an unfinished answer closes the connection.
        finally:
            self._guard.close()

    async def _tell(self, generations: Sequence[Generation], changed: asyncio.Event) -> None:
        """All events; whatever goes wrong is the last one."""
        try:
            if self._job.resume_from is None:
                await self._write(self._output.opening() + self._plain_echoes())
            async for batch in _batches(generations, changed):
                await self._write_batch(batch)
            await self._write(self._output.closing(self._samples.close()), is_last=True)
        except HeadwayError as error:
            await self._fail(error)
        except Exception:
            await self._fail(HeadwayError(Reason.INTERNAL, INTERNAL_MESSAGE))
            raise

    async def _write_batch(self, batch: Sequence[tuple[int, Event]]) -> None:
        """One write; raises the failure of a request after the tokens that came before it."""
        pieces: list[bytes] = []
        error: HeadwayError | None = None
        for number, event in batch:
            if isinstance(event, Tokens | SampleEnded):
                pieces.append(self._encode(number, event))
            elif isinstance(event, Scored) and self._job.echoes:
                add_scores(self._job.echoes[number], event.scores)
                pieces.append(self._echo(number))
            elif isinstance(event, Finish):
                try:
                    self._samples.finish(number, event)
                except HeadwayError as failure:
                    error = failure
        await self._write(b"".join(pieces))
        if error is not None:
            raise error

    def _encode(self, number: int, event: Tokens | SampleEnded) -> bytes:
        index = self._samples.index(number, event.sample)
        delta = self._samples.push(index, event)
        event_number = self._samples.choices[index].num_tokens
        if isinstance(event, SampleEnded):
            event_number += 1
            if self._job.num_skipped >= event_number:
                return b""  # this event was seen as well
        data = self._output.chunk(index, delta)
        if data and self._id_prefix:
            return self._id_prefix + b"%d\n" % event_number + data
        return data

    def _plain_echoes(self) -> bytes:
        """Prompts that nothing is to be said about; the others wait for what is."""
        if self._job.spec.wants_logprobs:
            return b""
        return b"".join(map(self._echo, range(len(self._job.echoes))))

    def _echo(self, number: int) -> bytes:
        echo = self._job.echoes[number]
        indexes = (self._samples.index(number, sample) for sample in self._sample_numbers())
        return b"".join(self._output.chunk(index, echo.as_delta()) for index in indexes)

    def _sample_numbers(self) -> range:
        return range(self._job.spec.num_samples)

    async def _write(self, data: bytes, is_last: bool = False) -> None:
        if data or is_last:
            message = {"type": "http.response.body", "body": data, "more_body": not is_last}
            await self._send_in_time(message)

    async def _send_in_time(self, message: Message) -> None:
        self._guard.writing_since = self._time()
        await self._send(message)
        self._guard.writing_since = None

    async def _fail(self, error: HeadwayError) -> None:
        """The last event."""
        await self._write(self._output.failure(error), is_last=True)
