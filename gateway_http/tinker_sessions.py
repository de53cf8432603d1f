"""What a Tinker SDK asks before it samples, and beside it: switches, tokens, sessions.

Sessions and heartbeats are answered, not kept; a sampling session is a signed name for a model.
"""

import secrets
import time
import uuid

from starlette.requests import Request
from starlette.responses import Response

from gateway_http.auth import Caller, Tenants
from gateway_http.client import SchedulerClient
from gateway_http.http_errors import invalid, json_response
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_schema import CreateSamplingSession, JoinSamplingSession, parse
from gateway_http.tinker_tokens import SamplingSession, Signer
from headway.errors import HeadwayError
from headway.reasons import Reason

API_KEY = "x-api-key"
SEQ_IDS_PER_CLONE = 10**9  # how the SDK's clones of one sampling client share its numbers
# MinT's own keys; its SDK uses them only where they can be exchanged for a JWT.
_MINT_KEY_PREFIX = "sk-"
_DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


class Sessions:
    """Handlers take a request and its caller; healthz and auth_token need none."""

    def __init__(
        self,
        client: SchedulerClient,
        settings: GatewaySettings,
        tenants: Tenants,
        signer: Signer,
    ) -> None:
        self._client = client
        self._settings = settings
        self._tenants = tenants
        self._signer = signer

    async def healthz(self, request: Request) -> Response:
        """Whether there is a server at all."""
        return json_response({"status": "ok"})

    async def client_config(self, request: Request, caller: Caller) -> Response:
        """Client-side switches; what is absent has the SDK's default."""
        is_mint = request.headers.get(API_KEY, "").startswith(_MINT_KEY_PREFIX)
        settings = self._settings
        return json_response(
            {
                "pjwt_auth_enabled": is_mint,
                "sample_max_concurrent_requests": settings.tinker_max_outstanding,
                "sample_use_retrieve_futures": settings.tinker_use_poller,
                "sample_join_sampling_session": True,
            }
        )

    async def dynamic_config(self, request: Request, caller: Caller) -> Response:
        """Switches that the SDK asks for again and again."""
        return json_response(_DYNAMIC_CONFIG)

    async def auth_token(self, request: Request) -> Response:
        """For a key only: a token that could be had for a token would never end."""
        caller = self._tenants.caller(request)
        lifetime_s = self._settings.tinker_token_lifetime_s
        return json_response({"jwt": self._signer.jwt(caller.key_id, time.time(), lifetime_s)})

    async def capabilities(self, request: Request, caller: Caller) -> Response:
        """The models that can be sampled now."""
        models = [
            {
                "model_name": card.name,
                "max_context_length": card.max_context_tokens,
                "trainable": False,
                "sampleable": True,
            }
            for card in await self._client.list_models()
        ]
        return json_response({"supported_models": models})

    async def create_session(self, request: Request, caller: Caller) -> Response:
        """A fresh name, and what the operator has to say."""
        settings = self._settings
        messages = {
            "info_message": settings.tinker_info_message,
            "warning_message": settings.tinker_warning_message,
            "error_message": settings.tinker_error_message,
        }
        told = {name: text for name, text in messages.items() if text}
        body = {"type": "create_session", "session_id": str(uuid.uuid4()), **told}
        return json_response(body)

    async def heartbeat(self, request: Request, caller: Caller) -> Response:
        """Sessions are not kept, so none is ever unknown, also after a restart."""
        return json_response({"type": "session_heartbeat"})

    async def finish_session(self, request: Request, caller: Caller) -> Response:
        """There is nothing to forget."""
        return json_response({"type": "finish_session"})

    async def create_sampling_session(self, request: Request, caller: Caller) -> Response:
        """A name for a model. Raises MODEL_NOT_FOUND, or NO_CAPACITY."""
        body = parse(await request.body(), CreateSamplingSession)
        model = body.model_path or body.base_model
        if model is None:
            raise invalid("base_model or model_path is needed.", "base_model")
        await self._check_model(model)
        session = SamplingSession(model, body.session_id, body.sampling_session_seq_id)
        sampling_session_id = self._signer.session_id(session)
        return json_response(
            {"type": "create_sampling_session", "sampling_session_id": sampling_session_id}
        )

    async def _check_model(self, model: str) -> None:
        """Here an error surfaces at once; later the SDK would turn it into a long wait."""
        names = [card.name for card in await self._client.list_models()]
        if model in names:
            return
        try:
            await self._client.model(model)
        except HeadwayError as error:
            if error.reason is not Reason.MODEL_NOT_FOUND:
                raise
            message = "No such model; get_server_capabilities lists those that are served."
            raise HeadwayError(error.reason, message, field="base_model") from None
        raise HeadwayError(Reason.NO_CAPACITY, "No executor has the model at the moment.")

    async def sampler(self, request: Request, caller: Caller) -> Response:
        """The model behind the name of a sampling session."""
        sampler_id = request.path_params["sampling_session_id"]
        session = self._signer.session(sampler_id)
        return json_response({"sampler_id": sampler_id, "base_model": session.model})

    async def join_sampling_session(self, request: Request, caller: Caller) -> Response:
        """A number for a clone of a sampling client: its seq_ids begin at that many times 10**9.

        Drawn, as nobody counts here: two clones of one session meet by a chance of one in 10**9.
        """
        body = parse(await request.body(), JoinSamplingSession)
        self._signer.session(body.sampling_session_id)
        clone = 1 + secrets.randbelow(SEQ_IDS_PER_CLONE - 1)
        return json_response({"type": "join_sampling_session", "client_counter": clone})

    async def telemetry(self, request: Request, caller: Caller) -> Response:
        """Read and dropped: it may hold API keys, and nobody here needs it."""
        async for _ in request.stream():
            pass
        return json_response({"status": "accepted"})
