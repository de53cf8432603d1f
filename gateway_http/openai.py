"""The OpenAI endpoints: chats, completions, models, and the way back to a stream."""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response
from starlette.types import ASGIApp

from gateway_http.auth import Tenants
from gateway_http.client import SchedulerClient
from gateway_http.http_errors import invalid, json_response
from gateway_http.http_request import whole_body
from gateway_http.model_text import Text
from gateway_http.openai_caller_id import CallerId
from gateway_http.openai_chat_schema import ChatRequest
from gateway_http.openai_echo import make_echo
from gateway_http.openai_endpoint import Call, Endpoint, no_such_model
from gateway_http.openai_events import Events
from gateway_http.openai_job import Job
from gateway_http.openai_output import Echo
from gateway_http.openai_prompt import ChatWish
from gateway_http.openai_responses import Responses
from gateway_http.openai_sampling import (
    check_most,
    grammar_of,
    sampling_params,
)
from gateway_http.openai_schema import Common, CompletionRequest, decode
from gateway_http.openai_tokenize import Tokenizing
from gateway_http.settings import GatewaySettings
from headway.v1 import generation_pb2

COMPLETION_MAX_TOKENS = 16  # OpenAI's own default; a chat may fill the context


def routes(client: SchedulerClient, settings: GatewaySettings, tenants: Tenants) -> list[Route]:
    """Everything under /v1, and vLLM's two beside it."""
    parts = (client, settings, tenants)
    models = _ModelList(client, tenants)
    tokenizing = Tokenizing(client, settings, tenants)

    def route(method: str, path: str, app: ASGIApp) -> Route:
        return Route(path, CallerId(app, settings), methods=[method])

    return [
        route("POST", "/v1/chat/completions", _Chat(*parts)),
        route("POST", "/v1/completions", _Completions(*parts)),
        route("POST", "/v1/responses", Responses(*parts)),
        route("GET", "/v1/requests/{request_id}/events", Events(*parts)),
        route("GET", "/v1/models", request_response(models.all)),
        route("GET", "/v1/models/{name:path}", request_response(models.one)),
        route("POST", "/tokenize", request_response(tokenizing.tokenize)),
        route("POST", "/detokenize", request_response(tokenizing.detokenize)),
    ]


class _Chat(Endpoint):
    async def prepare(self, call: Call) -> Job:
        body = decode(ChatRequest, await whole_body(call.request.receive))
        max_tokens = _chat_max_tokens(body)
        self.check_counts(body, 1)
        num_top = _num_top(body, self.settings)
        model = await self.model(body)
        prompt = await self.prompts.make(model, self._wish(body))
        sampling = sampling_params(
            body,
            model,
            max_tokens=max_tokens,
            logprobs=bool(body.logprobs),
            num_top=num_top,
            grammar=prompt.grammar,
        )
        token_ids, num_samples = [prompt.token_ids], body.n or 1
        requests = self.requests(call, body, model, token_ids, sampling, num_samples)
        spec = self.spec(
            "chat",
            body,
            requests,
            **_common_spec(body),
            form=prompt.form,
            has_reasoning=body.include_reasoning is not False,
            has_call_reason=prompt.has_call_reason,
        )
        return self.job(call, body, spec, model.text, requests)

    def _wish(self, body: ChatRequest) -> ChatWish:
        return ChatWish(
            messages=body.messages,
            tools=body.tools or (),
            tool_choice=body.tool_choice,
            is_parallel=body.parallel_tool_calls is not False,
            kwargs=body.chat_template_kwargs,
            wants_no_thought=body.reasoning_effort == "none",
            has_generation_prompt=body.add_generation_prompt,
            continues_final_message=bool(body.continue_final_message),
            grammar=grammar_of(body, self.settings),
        )


class _Completions(Endpoint):
    def set_max_tokens(self, sampling: generation_pb2.SamplingParams, room: int) -> None:
        if not sampling.HasField("max_tokens"):
            sampling.max_tokens = min(COMPLETION_MAX_TOKENS, room)
        super().set_max_tokens(sampling, room)

    async def prepare(self, call: Call) -> Job:
        body = decode(CompletionRequest, await whole_body(call.request.receive))
        check_most("logprobs", body.num_top, self.settings.max_top_logprobs)
        if body.max_tokens == 0 and not body.echo:
            raise invalid("At least one token must be generated, but for an echo.", "max_tokens")
        prompts = body.prompts()
        self.check_counts(body, len(prompts))
        model = await self.model(body)
        has_specials = body.add_special_tokens is not False
        token_ids = [
            await model.text.encode(prompt, "prompt", has_specials)
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]
        sampling = sampling_params(
            body,
            model,
            max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
            logprobs=body.wants_logprobs,
            num_top=body.num_top,
            grammar=grammar_of(body, self.settings),
        )
        requests = self.requests(call, body, model, token_ids, sampling, body.n or 1)
        echoes = await _echoes(body, model.text, prompts, requests) if body.echo else []
        spec = self.spec(
            "completion",
            body,
            requests,
            **_common_spec(body, has_tokenizer=model.text.has_tokenizer),
            num_echo_chars=[len(echo.text) for echo in echoes],
            num_hidden=1 if body.max_tokens == 0 else 0,
        )
        return self.job(call, body, spec, model.text, requests, echoes)


class _ModelList:
    def __init__(self, client: SchedulerClient, tenants: Tenants) -> None:
        self._client = client
        self._tenants = tenants

    async def all(self, request: Request) -> Response:
        """GET /v1/models."""
        self._tenants.caller(request)
        cards = await self._client.list_models()
        return json_response({"object": "list", "data": [_describe(card) for card in cards]})

    async def one(self, request: Request) -> Response:
        """GET /v1/models/{name}; names may hold slashes."""
        self._tenants.caller(request)
        name = request.path_params["name"]
        for card in await self._client.list_models():
            if card.name == name:
                return json_response(_describe(card))
        raise no_such_model()


def _describe(card: generation_pb2.ModelCard) -> dict[str, str | int]:
    return {
        "id": card.name,
        "object": "model",
        "created": 0,
        "owned_by": "headway",
        "max_model_len": card.max_context_tokens,
    }


async def _echoes(
    body: CompletionRequest,
    text: Text,
    prompts: Sequence[str | list[int]],
    requests: Sequence[generation_pb2.GenerationRequest],
) -> list[Echo]:
    """The prompts; where logprobs are wanted, the requests ask for theirs, too."""
    echoes = []
    for request, prompt in zip(requests, prompts, strict=True):
        token_ids = list(request.prompt_token_ids)
        echoes.append(await make_echo(text, prompt, token_ids, body.wants_logprobs))
        if body.wants_logprobs:
            request.prompt_scoring.logprobs = True
            request.prompt_scoring.top_logprobs = body.num_top
    return echoes


def _chat_max_tokens(body: ChatRequest) -> int | None:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("Give max_tokens or max_completion_tokens, not both.", "max_tokens")
    if body.max_tokens == 0:
        raise invalid("At least one token must be generated.", "max_tokens")
    return body.max_completion_tokens or body.max_tokens


def _num_top(body: ChatRequest, settings: GatewaySettings) -> int:
    num_top = body.top_logprobs or 0
    check_most("top_logprobs", num_top, settings.max_top_logprobs)
    if num_top and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
    return num_top


def _common_spec(body: Common, *, has_tokenizer: bool = True) -> dict[str, Any]:
    """Tokens without text are told as ids."""
    return {
        "wants_token_ids": bool(body.return_token_ids) or not has_tokenizer,
        "has_usage_chunk": body.has_usage_chunk,
    }
