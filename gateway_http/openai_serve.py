"""Runs one OpenAI request to its end: waits, streams or collects, and stops when nobody listens.

Headers go out after every prompt was accepted, so a refusal has its real status. Afterwards an
error is the last event of a stream.

A stream of one choice under its client's Idempotency-Key can be continued: its events have ids
("<request>:<tokens>", and one more for the end), and Last-Event-ID skips what was seen. Work under
such a key is not cancelled when its reader hangs up, for the reader may come back at any gateway.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import orjson
from starlette.types import Message, Receive, Scope, Send

from gateway_http.client import Event, Finish, Generation, SampleEnded, SchedulerClient, Tokens
from gateway_http.http_errors import openai_error
from gateway_http.http_protocol import ABORT
from gateway_http.openai_output import Choice, Delta, Format
from gateway_http.settings import GatewaySettings
from gateway_http.text import Text
from headway.errors import INTERNAL_MESSAGE, HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_DONE = b"data: [DONE]\n\n"

FormatFactory = Callable[[str], Format]


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request's work: a generation for each prompt, in their order."""

    requests: Sequence[generation_pb2.GenerationRequest]
    text: Text
    make_format: FormatFactory
    is_streaming: bool
    has_usage_chunk: bool
    is_kept: bool
    resume_from: tuple[str, int] | None

    @property
    def num_skipped(self) -> int:
        """Tokens that were delivered on an earlier connection."""
        return self.resume_from[1] if self.resume_from is not None else 0

    @property
    def has_event_ids(self) -> bool:
        """Whether the stream can be continued."""
        return self.is_kept and len(self.requests) * self.num_samples == 1

    @property
    def num_samples(self) -> int:
        """Samples of each prompt."""
        return self.requests[0].num_samples

    def choices(self) -> list[Choice]:
        """One for each sample of each prompt."""
        return [
            Choice(self.text, request, self.num_skipped)
            for request in self.requests
            for _ in range(self.num_samples)
        ]


class Usage:
    """The sum over all prompts."""

    def __init__(self) -> None:
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    def add(self, usage: generation_pb2.Usage) -> None:
        """Count one finished prompt."""
        self._num_prompt_tokens += usage.num_prompt_tokens
        self._num_generated_tokens += usage.num_generated_tokens

    def as_dict(self) -> dict[str, int]:
        """In OpenAI's names."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_generated_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_generated_tokens,
        }


async def serve(
    job: Job,
    client: SchedulerClient,
    settings: GatewaySettings,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Submit, wait for acceptance, answer. Raises HeadwayError before the first byte only."""
    with contextlib.ExitStack() as stack:
        changed = asyncio.Event()
        generations: list[Generation] = []
        for request in job.requests:
            generation = client.generate(request, is_kept=job.is_kept, changed=changed)
            stack.callback(generation.cancel)
            generations.append(generation)
        async with _hang_up_cancels(receive, generations):
            accepted = [await generation.accepted() for generation in generations]
            request_id = accepted[0].request_id
            if job.resume_from is not None and job.resume_from[0] != request_id:
                # Its key was forgotten: what runs now is another draw, never to be joined to it.
                message = "The stream of this Last-Event-ID is gone: begin anew without it."
                raise HeadwayError(Reason.RESULT_EXPIRED, message, field="Last-Event-ID")
            output = job.make_format(request_id)
            if not job.is_streaming:
                body = await _collect(job, output, generations, changed)
                await _send_body(send, body, request_id)
                return
            stream = _Stream(job, output, settings.stream_write_timeout_s, scope, send)
            await stream.run(generations, changed, request_id)


@contextlib.asynccontextmanager
async def _hang_up_cancels(
    receive: Receive, generations: Sequence[Generation]
) -> AsyncIterator[None]:
    """While this is open, a client that goes away ends the work within one step."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for generation in generations:
            generation.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


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


async def _collect(
    job: Job, output: Format, generations: Sequence[Generation], changed: asyncio.Event
) -> bytes:
    choices = job.choices()
    deltas = [Delta() for _ in choices]
    usage = Usage()
    async for batch in _batches(generations, changed):
        for number, event in batch:
            if isinstance(event, Tokens):
                index = number * job.num_samples + event.sample
                _extend(deltas[index], choices[index].push(event))
            elif isinstance(event, SampleEnded):
                index = number * job.num_samples + event.sample
                _extend(deltas[index], choices[index].finish(event.detail))
            elif isinstance(event, Finish):
                if event.error is not None:
                    raise event.error
                usage.add(event.usage)
    return output.body(deltas, usage.as_dict())


def _extend(whole: Delta, part: Delta) -> None:
    whole.text += part.text
    whole.token_ids += part.token_ids
    whole.logprobs += part.logprobs
    whole.text_offsets += part.text_offsets
    whole.finish_reason = part.finish_reason


async def _send_body(send: Send, body: bytes, request_id: str) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _StallGuard:
    """Cuts the connection and cancels the current task when one write takes too long.

    A look at the clock now and then costs less than a timer for every token.
    """

    def __init__(self, limit_s: float, abort: Callable[[], None] | None) -> None:
        self._limit_s = limit_s
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(limit_s, self._look)
        self.writing_since: float | None = None
        self.has_stalled = False

    def close(self) -> None:
        """Stop looking."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        since = self.writing_since if self.writing_since is not None else now
        if now - since >= self._limit_s:
            assert self._task is not None
            self.has_stalled = True
            if self._abort is not None:
                self._abort()
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(since + self._limit_s - now, self._look)


class _Stream:
    """An SSE answer: one write for whatever came together."""

    def __init__(
        self, job: Job, output: Format, write_timeout_s: float, scope: Scope, send: Send
    ) -> None:
        self._job = job
        self._output = output
        self._guard = _StallGuard(write_timeout_s, scope.get("state", {}).get(ABORT))
        self._time = asyncio.get_running_loop().time
        self._send = send
        self._choices = job.choices()
        self._usage = Usage()
        self._id_prefix = b""

    async def run(
        self, generations: Sequence[Generation], changed: asyncio.Event, request_id: str
    ) -> None:
        headers = [*_SSE_HEADERS, (b"x-request-id", request_id.encode())]
        if self._job.has_event_ids:
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
                first = map(self._output.first, range(len(self._choices)))
                await self._write(b"".join(first))
            async for batch in _batches(generations, changed):
                await self._write_batch(batch)
            if self._job.has_usage_chunk:
                await self._write(self._output.usage_chunk(self._usage.as_dict()))
            await self._write(_DONE, is_last=True)
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
            if not isinstance(event, Finish):
                pieces.append(self._encode(number, event))
            elif event.error is None:
                self._usage.add(event.usage)
            else:
                error = event.error
        await self._write(b"".join(pieces))
        if error is not None:
            raise error

    def _encode(self, number: int, event: Event) -> bytes:
        if isinstance(event, Tokens):
            index = number * self._job.num_samples + event.sample
            delta = self._choices[index].push(event)
            is_told = self._output.wants_logprobs or self._output.wants_token_ids
            if not (delta.text or (is_told and delta.token_ids)):
                return b""
            return self._chunk(index, delta, self._choices[index].num_tokens)
        if isinstance(event, SampleEnded):
            index = number * self._job.num_samples + event.sample
            delta = self._choices[index].finish(event.detail)
            num_told = self._choices[index].num_tokens + 1
            if self._job.num_skipped >= num_told:
                return b""  # this event was seen as well
            return self._chunk(index, delta, num_told)
        return b""

    def _chunk(self, index: int, delta: Delta, event_number: int) -> bytes:
        event_id = self._id_prefix + b"%d\n" % event_number if self._id_prefix else b""
        return event_id + self._output.chunk(index, delta)

    async def _write(self, data: bytes, is_last: bool = False) -> None:
        if data:
            message = {"type": "http.response.body", "body": data, "more_body": not is_last}
            await self._send_in_time(message)

    async def _send_in_time(self, message: Message) -> None:
        self._guard.writing_since = self._time()
        await self._send(message)
        self._guard.writing_since = None

    async def _fail(self, error: HeadwayError) -> None:
        """The last event."""
        await self._write(b"data: " + orjson.dumps(openai_error(error)) + b"\n\n", is_last=True)
