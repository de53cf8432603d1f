"""What the OpenAI endpoints that generate do alike: who calls, by which name, how urgently."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf import duration_pb2
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gateway_http.auth import Caller, Tenants
from gateway_http.client import LoadedModel, SchedulerClient
from gateway_http.http_errors import error_response, invalid
from gateway_http.model_text import prompt_too_long
from gateway_http.openai_job import Job
from gateway_http.openai_prompt import Prompts
from gateway_http.openai_sampling import check_most
from gateway_http.openai_schema import Common, Sampling
from gateway_http.openai_serve import serve
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.v1 import generation_pb2

_MAX_KEY_CHARS = 256
_MAX_BAND = 2**31 - 1
_CALLER_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call. ``caller_id`` is its x-request-id, to be said back to it."""

    request: Request
    caller: Caller
    caller_id: str


class Endpoint:
    """An ASGI application; a subclass makes the job."""

    def __init__(
        self, client: SchedulerClient, settings: GatewaySettings, tenants: Tenants
    ) -> None:
        self.client = client
        self.settings = settings
        self.tenants = tenants
        self.prompts = Prompts(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        call_id = caller_id(request)
        try:
            job = await self.prepare(Call(request, self.tenants.caller(request), call_id))
            await serve(job, self.client, self.settings, scope, send)
        except HeadwayError as error:
            if not call_id:
                raise
            response = error_response(error, scope["path"], self.settings)
            response.headers["x-request-id"] = call_id
            await response(scope, receive, send)

    async def prepare(self, call: Call) -> Job:
        """What is to be done. Raises HeadwayError."""
        raise NotImplementedError

    def requests(
        self,
        call: Call,
        body: Sampling,
        model: LoadedModel,
        prompts: Sequence[list[int]],
        sampling: generation_pb2.SamplingParams,
        num_samples: int = 1,
    ) -> list[generation_pb2.GenerationRequest]:
        """The scheduler's requests: one for each prompt."""
        headers = call.request.headers
        key = headers.get("idempotency-key", "")
        if len(key) > _MAX_KEY_CHARS:
            raise invalid("The Idempotency-Key is too long.", "Idempotency-Key")
        requests = []
        for number, prompt in enumerate(prompts):
            one = generation_pb2.GenerationRequest(
                model=body.model,
                prompt_token_ids=prompt,
                sampling=sampling,
                num_samples=num_samples,
                session_id=_session_id(call.request, body),
                band=_band(call.request, body),
                idempotency_key=f"{key}/{number}" if key and len(prompts) > 1 else key,
            )
            call.caller.sign(one)
            check_prompt(prompt, model.card)
            self.set_max_tokens(one.sampling, model.card.max_context_tokens - len(prompt))
            if body.queue_timeout_s is not None:
                one.queue_timeout.CopyFrom(_duration(body.queue_timeout_s))
            if body.execution_timeout_s is not None:
                one.execution_timeout.CopyFrom(_duration(body.execution_timeout_s))
            requests.append(one)
        return requests

    def set_max_tokens(self, sampling: generation_pb2.SamplingParams, room: int) -> None:
        """Check it against the room behind the prompt; unset it fills the room."""
        if sampling.max_tokens > room:
            message = f"The model's context leaves room for {room} tokens after this prompt."
            raise invalid(message, "max_tokens")
        if sampling.min_tokens > (sampling.max_tokens or room):
            raise invalid("min_tokens is larger than what may be generated.", "min_tokens")

    def check_counts(self, body: Common, num_prompts: int) -> None:
        """Samples and prompts. Raises INVALID_REQUEST."""
        settings = self.settings
        num_samples = body.n or 1
        check_most("n", num_samples, settings.max_samples)
        check_most("prompt", num_prompts, settings.max_prompts)
        check_most("n", num_samples * num_prompts, settings.max_sequences)
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream: true.", "stream_options")


def caller_id(request: Request) -> str:
    """The x-request-id, if there is one. Raises INVALID_REQUEST if it is none to be said back."""
    value = request.headers.get("x-request-id", "")
    if value and not _CALLER_ID.fullmatch(value):
        message = "An x-request-id has up to 128 letters, digits and -_.:/+= characters."
        raise invalid(message, "x-request-id")
    return value


def check_prompt(prompt: Sequence[int], card: generation_pb2.ModelCard) -> None:
    """Raises INVALID_REQUEST or PROMPT_TOO_LONG."""
    context = card.max_context_tokens
    if not prompt:
        raise invalid("The prompt is empty.", "prompt")
    if len(prompt) >= context:
        raise prompt_too_long(len(prompt), context, "prompt")
    if max(prompt) >= card.vocab_size:
        raise invalid(f"Token ids must be below {card.vocab_size}.", "prompt")


def resume_from(request: Request, *, can_resume: bool) -> tuple[str, int] | None:
    """The request and the number in the id of an event."""
    last_event_id = request.headers.get("last-event-id")
    if last_event_id is None:
        return None
    request_id, _, number = last_event_id.rpartition(":")
    if not (request_id and is_count(number)):
        raise invalid("The Last-Event-ID is not the id of an event.", "Last-Event-ID")
    if not can_resume:
        message = "Last-Event-ID needs a stream with one choice and its Idempotency-Key."
        raise invalid(message, "Last-Event-ID")
    return request_id, int(number)


def is_count(text: str) -> bool:
    """A number of events."""
    return text.isascii() and text.isdigit() and len(text) < 10


def _session_id(request: Request, body: Sampling) -> str:
    if body.session_id is not None:
        return body.session_id
    value = request.headers.get("x-headway-session-id", "")
    if len(value) > 256 or not value.isprintable():
        raise invalid("A session's id has up to 256 characters.", "x-headway-session-id")
    return value


def _band(request: Request, body: Sampling) -> int | None:
    value = request.headers.get("x-headway-priority")
    if body.priority is not None or value is None:
        return body.priority
    if not is_count(value):
        raise invalid("A priority is a number from 0 on.", "x-headway-priority")
    return min(int(value), _MAX_BAND)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(max(1, round(seconds * 1000)))
    return duration
