"""POST /tokenize and /detokenize, as vLLM has them: what a prompt would be, without asking it."""

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from gateway_http.auth import Tenants
from gateway_http.client import LoadedModel, SchedulerClient
from gateway_http.http_errors import invalid, json_response
from gateway_http.model_text import Text
from gateway_http.openai_chat_schema import DetokenizeRequest, TokenizeRequest
from gateway_http.openai_endpoint import served_model
from gateway_http.openai_logprobs import token_name
from gateway_http.openai_prompt import ChatWish, Prompts
from gateway_http.openai_schema import decode
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason

_NAMES_AT_ONCE = 256


class Tokenizing:
    """Both endpoints."""

    def __init__(
        self, client: SchedulerClient, settings: GatewaySettings, tenants: Tenants
    ) -> None:
        self._client = client
        self._tenants = tenants
        self._prompts = Prompts(settings)

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of a chat; a text may be longer than the context."""
        self._tenants.caller(request)
        body = decode(TokenizeRequest, await request.body())
        if (body.prompt is None) == (body.messages is None):
            raise invalid("Give a prompt or messages.", "prompt")
        model = await self._model(body.model)
        token_ids = await self._token_ids(model, body)
        answer = {
            "count": len(token_ids),
            "max_model_len": model.card.max_context_tokens,
            "tokens": token_ids,
        }
        if body.return_token_strs:
            answer["token_strs"] = await _names(model.text, token_ids)
        return json_response(answer)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special tokens as they are written."""
        self._tenants.caller(request)
        body = decode(DetokenizeRequest, await request.body())
        model = await self._model(body.model)
        if body.tokens and max(body.tokens) >= model.card.vocab_size:
            raise invalid(f"Token ids must be below {model.card.vocab_size}.", "tokens")
        if len(body.tokens) > model.card.max_context_tokens:
            raise invalid("This is more than the model's context takes.", "tokens")
        return json_response({"prompt": await model.text.decode(body.tokens, "tokens")})

    async def _model(self, name: str | None) -> LoadedModel:
        """Where one model is served, it need not be named."""
        if name is None:
            cards = await self._client.list_models()
            if not cards:
                raise HeadwayError(Reason.NO_CAPACITY, "No executor is attached yet.")
            if len(cards) > 1:
                raise invalid("Several models are served: name one.", "model")
            name = cards[0].name
        return await served_model(self._client, name)

    async def _token_ids(self, model: LoadedModel, body: TokenizeRequest) -> list[int]:
        if body.prompt is not None:
            for name in ("tools", "chat_template_kwargs", "continue_final_message"):
                if getattr(body, name):
                    raise invalid("This belongs to messages.", name)
            has_specials = body.add_special_tokens is not False
            return await model.text.encode(body.prompt, "prompt", has_specials, is_prompt=False)
        if body.add_special_tokens:
            raise invalid("A chat's template brings its own special tokens.", "add_special_tokens")
        wish = ChatWish(
            messages=body.messages or (),
            tools=body.tools or (),
            kwargs=body.chat_template_kwargs,
            has_generation_prompt=body.add_generation_prompt,
            continues_final_message=bool(body.continue_final_message),
        )
        return (await self._prompts.make(model, wish)).token_ids


async def _names(text: Text, token_ids: Sequence[int]) -> list[str]:
    """Other requests have their turn now and then."""
    names = []
    for number, token_id in enumerate(token_ids, 1):
        names.append(token_name(text, token_id))
        if number % _NAMES_AT_ONCE == 0:
            await asyncio.sleep(0)
    return names
