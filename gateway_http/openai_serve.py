"""Runs one OpenAI request to its end: waits, streams or collects, and stops when nobody listens.

Headers go out after every prompt was accepted, so a refusal has its real status. A reader that
hangs up cancels its work, unless that has a key: then it may come back.
"""

from collections.abc import Sequence
from functools import partial

from starlette.types import Scope, Send

from gateway_http.client import (
    Accepted,
    Finish,
    Generation,
    SampleEvent,
    SchedulerClient,
    Scored,
)
from gateway_http.http_protocol import DEPARTURE, Departure
from gateway_http.openai_choice import Delta
from gateway_http.openai_echo import add_scores
from gateway_http.openai_job import RESUME_HEADER, Job, Samples, batches
from gateway_http.openai_output import Format
from gateway_http.openai_place import stream_name
from gateway_http.openai_stream import Stream
from gateway_http.settings import GatewaySettings
from headway.bell import Bell
from headway.errors import HeadwayError
from headway.reasons import Reason

# Some clients take no longer headers. Long stop strings make it long, or tools and instructions,
# which a response says back.
_MAX_STATE_BYTES = 4_096


async def serve(
    job: Job,
    client: SchedulerClient,
    settings: GatewaySettings,
    scope: Scope,
    send: Send,
) -> None:
    """Submit, wait for acceptance, answer. Raises HeadwayError before the first byte only.

    After it, StreamCutError for a client that does not take its stream.
    """
    changed = client.bell()
    generations: list[Generation] = []
    departure: Departure = scope.get("state", {}).get(DEPARTURE) or Departure()
    departure.listen(partial(_cancel, generations))
    try:
        for generation in job.start(client, changed):
            generations.append(generation)  # one by one: a later one may be refused
            if job.is_kept and len(generations) == 1:
                # a key of another request stops here, before the other prompts are begun
                await _accepted(job, generations)
        accepted = await _accepted(job, generations)
        request_ids = [one.request_id for one in accepted]
        name = stream_name(request_ids)
        if job.resume_from is not None and job.resume_from.stream != name:
            # Its key was forgotten: what runs now is another draw, never to be joined to it.
            message = "The stream of this Last-Event-ID is gone: begin anew without it."
            raise HeadwayError(Reason.RESULT_EXPIRED, message, field="Last-Event-ID")
        output = job.format(request_ids[0])
        headers = _headers(job, request_ids)
        if not job.is_streaming:
            body = await _collect(job, output, generations, changed)
            await _send_body(send, body, headers)
            return
        stream = Stream(job, output, name, settings.stream_write_timeout_s, scope, send)
        for generation in generations:
            generation.limit_unread(settings.max_unread_tokens, stream.guard.fall_behind)
        await stream.run(generations, changed, headers)
    finally:
        departure.ignore()
        _cancel(generations)


async def _accepted(job: Job, generations: Sequence[Generation]) -> list[Accepted]:
    try:
        return [await generation.accepted() for generation in generations]
    except HeadwayError as error:
        raise job.told(error) from None


def _cancel(generations: Sequence[Generation]) -> None:
    """The client hung up: the work ends within one step."""
    for generation in generations:
        generation.cancel()


async def _collect(
    job: Job, output: Format, generations: Sequence[Generation], changed: Bell
) -> bytes:
    samples = Samples(job)
    deltas = [Delta() for _ in samples.choices]
    async for batch in batches(generations, changed):
        for number, event in batch:
            if isinstance(event, SampleEvent):
                index = samples.index(number, event.sample)
                deltas[index].extend(samples.push(index, event))
            elif isinstance(event, Scored) and job.echoes:
                add_scores(job.echoes[number], event.scores)
            elif isinstance(event, Finish):
                samples.finish(number, event)
    if job.echoes:
        deltas = [_with_echo(job, number, delta) for number, delta in enumerate(deltas)]
    return await output.body(deltas, samples.close())


def _with_echo(job: Job, index: int, delta: Delta) -> Delta:
    whole = job.echoes[index // job.spec.num_samples].as_delta()
    whole.extend(delta)
    return whole


def _headers(job: Job, request_ids: Sequence[str]) -> list[tuple[bytes, bytes]]:
    own_id = request_ids[0].encode()
    headers = [
        (b"x-request-id", own_id),  # unless the caller has its own
        (b"x-headway-request-id", own_id),
    ]
    if job.is_resumable:
        state = job.resume_state(request_ids).encode()
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
