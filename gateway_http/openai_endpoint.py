"""What the OpenAI endpoints that generate do alike: who calls, by which name, how urgently."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from google.protobuf import duration_pb2
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gateway_http.auth import Caller, Tenants
from gateway_http.client import LoadedModel, SchedulerClient
from gateway_http.http_errors import invalid
from gateway_http.http_request import header
from gateway_http.model_text import Text, prompt_too_long
from gateway_http.openai_choice import Kind, ReplySpec, tail_of
from gateway_http.openai_job import Job
from gateway_http.openai_output import Echo
from gateway_http.openai_place import MAX_CHOICES, is_count, last_event
from gateway_http.openai_prompt import Prompts
from gateway_http.openai_sampling import check_limits, check_most, grammar_field
from gateway_http.openai_schema import Common, Sampling
from gateway_http.openai_serve import serve
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

_MAX_BAND = 2**31 - 1
_NEXT_PROMPT = "\u2192"  # what no client can write into a header


class Call(msgspec.Struct, frozen=True):
    """One HTTP call, and whose it is."""

    request: Request
    caller: Caller


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
        job = await self.prepare(Call(request, self.tenants.caller(request)))
        await serve(job, self.client, self.settings, scope, send)

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
        """The scheduler's requests: one for each prompt, and each with its own idempotency key.

        A note of what all prompts are makes each of them a part of this call only: its key is
        that of another request as soon as there is a prompt more or less.
        """
        key = header(call.request.scope, b"idempotency-key") or ""
        note = _digest_of(prompts) if key and len(prompts) > 1 else b""
        requests = []
        for number, prompt in enumerate(prompts):
            one = generation_pb2.GenerationRequest(
                model=body.model,
                prompt_token_ids=prompt,
                sampling=sampling,
                num_samples=num_samples,
                session_id=_session_id(call.request, body),
                band=_band(call.request, body),
                idempotency_key=_next_key(key, number) if key and number else key,
                note=note,
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

    async def model(self, body: Sampling) -> LoadedModel:
        """The one that is asked for, and that can do what is asked."""
        model = await served_model(self.client, body.model)
        check_limits(body, self.settings, model.text.has_tokenizer)
        return model

    def spec(
        self,
        kind: Kind,
        body: Sampling,
        requests: Sequence[generation_pb2.GenerationRequest],
        **more: Any,
    ) -> ReplySpec:
        """How to tell what comes of them."""
        return ReplySpec(
            kind=kind,
            model=body.model,
            created=int(time.time()),
            num_samples=requests[0].num_samples,
            prompt_tails=[tail_of(request.prompt_token_ids) for request in requests],
            stop_strings=body.stop_strings,
            wants_logprobs=requests[0].sampling.logprobs,
            has_timing=bool(body.include_timing),
            **more,
        )

    def job(
        self,
        call: Call,
        body: Sampling,
        spec: ReplySpec,
        text: Text,
        requests: Sequence[generation_pb2.GenerationRequest],
        echoes: Sequence[Echo] = (),
    ) -> Job:
        """To submit them; under an Idempotency-Key it may be the rest of an earlier call."""
        place = last_event(call.request, spec.num_places)
        job = Job(
            spec=spec,
            text=text,
            is_streaming=bool(body.stream),
            requests=requests,
            is_kept=bool(requests[0].idempotency_key),
            resume_from=place,
            echoes=echoes,
            grammar_field=grammar_field(body),
        )
        if place is not None and not (job.is_kept and job.is_resumable):
            message = (
                f"Last-Event-ID needs a stream of up to {MAX_CHOICES} choices, and the "
                "Idempotency-Key that it began with."
            )
            raise invalid(message, "Last-Event-ID")
        return job

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


async def served_model(client: SchedulerClient, name: str) -> LoadedModel:
    """Raises MODEL_NOT_FOUND, which says where the names are."""
    try:
        return await client.model(name)
    except HeadwayError as error:
        if error.reason is not Reason.MODEL_NOT_FOUND:
            raise
        raise no_such_model() from None


def no_such_model() -> HeadwayError:
    """The refusal of a name that no executor offers."""
    message = "No such model; GET /v1/models lists those that are served."
    return HeadwayError(Reason.MODEL_NOT_FOUND, message, field="model")


def _next_key(key: str, number: int) -> str:
    """Of a later prompt: what no client can send, and no longer than the longest key."""
    return f"{hashlib.sha256(key.encode()).hexdigest()}{_NEXT_PROMPT}{number}"


def _digest_of(prompts: Sequence[list[int]]) -> bytes:
    """Differs with any token, and with where a prompt ends."""
    return hashlib.sha256(msgspec.msgpack.encode(prompts)).digest()


def check_prompt(prompt: Sequence[int], card: generation_pb2.ModelCard) -> None:
    """Raises INVALID_REQUEST or PROMPT_TOO_LONG."""
    context = card.max_context_tokens
    if not prompt:
        raise invalid("The prompt is empty.", "prompt")
    if len(prompt) >= context:
        raise prompt_too_long(len(prompt), context, "prompt")
    if max(prompt) >= card.vocab_size:
        raise invalid(f"Token ids must be below {card.vocab_size}.", "prompt")


def _session_id(request: Request, body: Sampling) -> str:
    if body.session_id is not None:
        return body.session_id
    value = header(request.scope, b"x-headway-session-id") or ""
    if len(value) > 256 or not value.isprintable():
        raise invalid("A session's id has up to 256 characters.", "x-headway-session-id")
    return value


def _band(request: Request, body: Sampling) -> int | None:
    value = header(request.scope, b"x-headway-priority")
    if body.priority is not None or value is None:
        return body.priority
    if not is_count(value):
        raise invalid("A priority is a number from 0 on.", "x-headway-priority")
    return min(int(value), _MAX_BAND)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(max(1, round(seconds * 1000)))
    return duration
