"""The OpenAI endpoints: what a request means in tokens, and which limits it must keep."""

from collections.abc import Sequence
from functools import partial

from google.protobuf import duration_pb2
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway_http.auth import Tenants
from gateway_http.client import LoadedModel, SchedulerClient
from gateway_http.generation_defaults import GenerationDefaults
from gateway_http.http_errors import UnsupportedParameterError, invalid, json_response
from gateway_http.openai_output import ChatFormat, CompletionFormat
from gateway_http.openai_schema import (
    ChatMessage,
    ChatRequest,
    Common,
    CompletionRequest,
    decode,
)
from gateway_http.openai_serve import Job, serve
from gateway_http.settings import GatewaySettings
from gateway_http.text import Message, prompt_too_long
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

COMPLETION_MAX_TOKENS = 16  # OpenAI's own default; a chat may fill the context
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MAX_KEY_CHARS = 256


def routes(client: SchedulerClient, settings: GatewaySettings, tenants: Tenants) -> list[Route]:
    """Everything under /v1."""
    models = _ModelList(client, tenants)
    return [
        Route("/v1/chat/completions", _Chat(client, settings, tenants), methods=["POST"]),
        Route("/v1/completions", _Completions(client, settings, tenants), methods=["POST"]),
        Route("/v1/models", models.all, methods=["GET"]),
        Route("/v1/models/{name:path}", models.one, methods=["GET"]),
    ]


class _Endpoint:
    def __init__(
        self, client: SchedulerClient, settings: GatewaySettings, tenants: Tenants
    ) -> None:
        self._client = client
        self._settings = settings
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        tenant = self._tenants.of(request)
        job = await self._prepare(request, tenant)
        await serve(job, self._client, self._settings, scope, receive, send)

    async def _prepare(self, request: Request, tenant: str) -> Job:
        raise NotImplementedError

    def _requests(
        self,
        request: Request,
        tenant: str,
        body: Common,
        model: LoadedModel,
        prompts: Sequence[list[int]],
        sampling: generation_pb2.SamplingParams,
    ) -> list[generation_pb2.GenerationRequest]:
        """The scheduler's requests: one for each prompt."""
        key = request.headers.get("idempotency-key", "")
        if len(key) > _MAX_KEY_CHARS:
            raise invalid("The Idempotency-Key is too long.", "Idempotency-Key")
        requests = []
        for number, prompt in enumerate(prompts):
            one = generation_pb2.GenerationRequest(
                model=body.model,
                prompt_token_ids=prompt,
                sampling=sampling,
                num_samples=body.n or 1,
                tenant=tenant,
                session_id=body.session_id or "",
                band=body.priority,
                idempotency_key=f"{key}/{number}" if key and len(prompts) > 1 else key,
            )
            _check_prompt(prompt, model.card)
            self._set_max_tokens(one.sampling, model.card.max_context_tokens - len(prompt))
            if body.queue_timeout_s is not None:
                one.queue_timeout.CopyFrom(_duration(body.queue_timeout_s))
            if body.execution_timeout_s is not None:
                one.execution_timeout.CopyFrom(_duration(body.execution_timeout_s))
            requests.append(one)
        return requests

    def _set_max_tokens(self, sampling: generation_pb2.SamplingParams, room: int) -> None:
        """Check it against the room behind the prompt; unset it fills the room."""
        if sampling.max_tokens > room:
            message = f"The model's context leaves room for {room} tokens after this prompt."
            raise invalid(message, "max_tokens")
        if sampling.min_tokens > (sampling.max_tokens or room):
            raise invalid("min_tokens is larger than what may be generated.", "min_tokens")

    def _check_counts(self, body: Common, num_prompts: int, has_tokenizer: bool) -> None:
        settings = self._settings
        num_samples = body.n or 1
        _check_most("n", num_samples, settings.max_samples)
        _check_most("prompt", num_prompts, settings.max_prompts)
        _check_most("n", num_samples * num_prompts, settings.max_sequences)
        _check_most("stop", len(body.stop_strings), settings.max_stop_strings)
        _check_most("stop_token_ids", len(body.stop_token_ids or ()), settings.max_stop_strings)
        for stop in body.stop_strings:
            if not 0 < len(stop) <= settings.max_stop_string_chars:
                limit = settings.max_stop_string_chars
                raise invalid(f"A stop string has 1 to {limit} characters.", "stop")
        if body.stop_strings and not has_tokenizer:
            raise invalid("The model has no tokenizer: use stop_token_ids.", "stop")


class _Chat(_Endpoint):
    async def _prepare(self, request: Request, tenant: str) -> Job:
        body = decode(ChatRequest, await request.body())
        _check_most("messages", len(body.messages), self._settings.max_messages)
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise invalid("Give max_tokens or max_completion_tokens, not both.", "max_tokens")
        messages = [_message(number, one) for number, one in enumerate(body.messages)]
        model = await self._client.model(body.model)
        self._check_counts(body, 1, model.text.has_tokenizer)
        prompt = await model.text.encode_chat(messages, "messages")
        max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = _sampling(body, model.defaults, max_tokens, body.wants_logprobs)
        make_format = partial(
            ChatFormat,
            model=body.model,
            text=model.text,
            wants_logprobs=body.wants_logprobs,
            wants_token_ids=bool(body.return_token_ids),
        )
        requests = self._requests(request, tenant, body, model, [prompt], sampling)
        return _job(request, body, requests, model, make_format)


class _Completions(_Endpoint):
    def _set_max_tokens(self, sampling: generation_pb2.SamplingParams, room: int) -> None:
        if not sampling.HasField("max_tokens"):
            sampling.max_tokens = min(COMPLETION_MAX_TOKENS, room)
        super()._set_max_tokens(sampling, room)

    async def _prepare(self, request: Request, tenant: str) -> Job:
        body = decode(CompletionRequest, await request.body())
        if body.logprobs not in (None, False, True, 0):
            raise UnsupportedParameterError("logprobs", " above 0: only chosen tokens have one")
        prompts = body.prompts()
        model = await self._client.model(body.model)
        has_tokenizer = model.text.has_tokenizer
        self._check_counts(body, len(prompts), has_tokenizer)
        token_ids = [
            await model.text.encode(prompt, "prompt") if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        sampling = _sampling(body, model.defaults, body.max_tokens, body.wants_logprobs)
        make_format = partial(
            CompletionFormat,
            model=body.model,
            text=model.text,
            wants_logprobs=body.wants_logprobs,
            wants_token_ids=bool(body.return_token_ids) or not has_tokenizer,
        )
        requests = self._requests(request, tenant, body, model, token_ids, sampling)
        return _job(request, body, requests, model, make_format)


class _ModelList:
    def __init__(self, client: SchedulerClient, tenants: Tenants) -> None:
        self._client = client
        self._tenants = tenants

    async def all(self, request: Request) -> Response:
        """GET /v1/models."""
        self._tenants.of(request)
        cards = await self._client.list_models()
        return json_response({"object": "list", "data": [_describe(card) for card in cards]})

    async def one(self, request: Request) -> Response:
        """GET /v1/models/{name}; names may hold slashes."""
        self._tenants.of(request)
        name = request.path_params["name"]
        for card in await self._client.list_models():
            if card.name == name:
                return json_response(_describe(card))
        raise HeadwayError(Reason.MODEL_NOT_FOUND, "No such model.", field="model")


def _describe(card: generation_pb2.ModelCard) -> dict[str, str | int]:
    return {
        "id": card.name,
        "object": "model",
        "created": 0,
        "owned_by": "headway",
        "max_model_len": card.max_context_tokens,
    }


def _job(
    request: Request,
    body: Common,
    requests: list[generation_pb2.GenerationRequest],
    model: LoadedModel,
    make_format: "partial[ChatFormat] | partial[CompletionFormat]",
) -> Job:
    is_streaming = bool(body.stream)
    options = body.stream_options
    if options is not None and not is_streaming:
        raise invalid("stream_options needs stream: true.", "stream_options")
    job = Job(
        requests,
        model.text,
        make_format,
        is_streaming,
        has_usage_chunk=options is not None and bool(options.include_usage),
        is_kept=bool(requests[0].idempotency_key),
        resume_from=_resume_from(request.headers.get("last-event-id")),
    )
    if job.resume_from is not None and not (is_streaming and job.has_event_ids):
        message = "Last-Event-ID needs a stream with one choice and its Idempotency-Key."
        raise invalid(message, "Last-Event-ID")
    return job


def _resume_from(last_event_id: str | None) -> tuple[str, int] | None:
    """The request and the number in the id of an event."""
    if last_event_id is None:
        return None
    request_id, _, number = last_event_id.rpartition(":")
    if not (request_id and number.isascii() and number.isdigit() and len(number) < 10):
        raise invalid("The Last-Event-ID is not the id of an event.", "Last-Event-ID")
    return request_id, int(number)


def _sampling(
    body: Common, defaults: GenerationDefaults, max_tokens: int | None, wants_logprobs: bool
) -> generation_pb2.SamplingParams:
    top_k = body.top_k if body.top_k is not None else defaults.top_k
    return generation_pb2.SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature if body.temperature is not None else defaults.temperature,
        top_k=max(top_k or 0, 0),
        top_p=body.top_p if body.top_p is not None else defaults.top_p,
        min_p=body.min_p or 0.0,
        seed=None if body.seed is None else body.seed % 2**64,
        stop_token_ids=body.stop_token_ids or (),
        stop_strings=body.stop_strings,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        logprobs=wants_logprobs,
    )


def _message(number: int, message: ChatMessage) -> Message:
    """A message as templates know it: its role, and its content as one string."""
    role = _ROLES.get(message.role)
    if role is None:
        raise UnsupportedParameterError(f"messages[{number}].role", f": {message.role[:50]!r}")
    content = message.content
    if not isinstance(content, str):
        for place, part in enumerate(content or ()):
            if part.type != "text":
                where = f"messages[{number}].content[{place}].type"
                raise UnsupportedParameterError(where, f": {part.type[:50]!r}")
        if content is None and role != "assistant":
            raise invalid("The message has no content.", f"messages[{number}].content")
        content = "".join(part.text for part in content or ())
    plain: Message = {"role": role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _check_prompt(prompt: list[int], card: generation_pb2.ModelCard) -> None:
    context = card.max_context_tokens
    if not prompt:
        raise invalid("The prompt is empty.", "prompt")
    if len(prompt) >= context:
        raise prompt_too_long(len(prompt), context, "prompt")
    if max(prompt) >= card.vocab_size:
        raise invalid(f"Token ids must be below {card.vocab_size}.", "prompt")


def _check_most(field: str, value: int, limit: int) -> None:
    if value > limit:
        raise invalid(f"At most {limit} are allowed for {field}; this has {value}.", field)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(max(1, round(seconds * 1000)))
    return duration
