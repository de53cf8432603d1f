"""The Tinker endpoints, for the tinker and MinT SDKs: sampling, and futures that say how long.

Nothing is remembered here. Sampling sessions are signed names (tinker_tokens), requests live in
the scheduler, and a resent asample finds its first run by its idempotency key. Sessions and
heartbeats are therefore answered, not kept. What the SDKs need, down to a header, was found with
the real ones; the tests say which rule is for whom.
"""

import secrets
import time
import uuid
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway_http.auth import Caller, Tenants
from gateway_http.client import SchedulerClient
from gateway_http.http_errors import invalid, json_response
from gateway_http.refusals import TINKER, in_clients_words
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_futures import (
    finished,
    hold_s,
    is_sdk_poller,
    pending,
)
from gateway_http.tinker_polls import Polls
from gateway_http.tinker_schema import (
    CreateSamplingSession,
    Future,
    Futures,
    JoinSamplingSession,
    Sample,
    parse,
    to_generation,
)
from gateway_http.tinker_tokens import SamplingSession, Signer
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

_PREFIX = "/api/v1"
_API_KEY = "x-api-key"
# MinT's own keys; its SDK uses them only where they can be exchanged for a JWT.
_MINT_KEY_PREFIX = "sk-"
_JWT_PREFIX = "eyJ"
_DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}

SEQ_IDS_PER_CLONE = 10**9  # how the SDK's clones of one sampling client share its numbers

Handler = Callable[[Request, Caller], Awaitable[Response]]


def routes(client: SchedulerClient, settings: GatewaySettings, tenants: Tenants) -> list[Route]:
    """All under /api/v1."""
    door = _Door(client, settings, tenants)
    return [
        Route(f"{_PREFIX}/healthz", door.healthz, methods=["GET"]),
        door.post("client/config", door.client_config),
        door.post("client/dynamic_config", door.dynamic_config),
        Route(f"{_PREFIX}/auth/token", door.auth_token, methods=["POST"]),
        door.get("get_server_capabilities", door.capabilities),
        door.post("create_session", door.create_session),
        door.post("session_heartbeat", door.heartbeat),
        door.post("sessions/{session_id}/finish", door.finish_session),
        door.post("create_sampling_session", door.create_sampling_session),
        door.post("join_sampling_session", door.join_sampling_session),
        door.get("samplers/{sampling_session_id}", door.sampler),
        door.post("asample", door.asample),
        door.post("retrieve_future", door.retrieve_future),
        door.post("retrieve_futures", door.retrieve_futures),
        door.post("cancel_future", door.cancel_future),
        door.post("telemetry", door.telemetry),
    ]


class _Door:
    """Handlers take a request and its caller."""

    def __init__(
        self, client: SchedulerClient, settings: GatewaySettings, tenants: Tenants
    ) -> None:
        self._client = client
        self._settings = settings
        self._tenants = tenants
        self._signer = Signer(settings.signing_secret())
        self._polls = Polls(client)

    def post(self, path: str, handler: Handler) -> Route:
        return Route(f"{_PREFIX}/{path}", self._authenticated(handler), methods=["POST"])

    def get(self, path: str, handler: Handler) -> Route:
        return Route(f"{_PREFIX}/{path}", self._authenticated(handler), methods=["GET"])

    def _authenticated(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await handler(request, self._caller(request))

        return endpoint

    def _caller(self, request: Request) -> Caller:
        """The key's, or that of the key for which we gave this JWT, if that is still good.

        An open installation has one tenant, and its signing key may be known to everybody.
        """
        key = request.headers.get(_API_KEY, "")
        if key.startswith(_JWT_PREFIX) and not self._tenants.is_open:
            key_id = self._signer.key_id(key, time.time())
            caller = self._tenants.by_id(key_id) if key_id is not None else None
            if caller is not None:
                return caller
        return self._tenants.caller(request)

    async def healthz(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def client_config(self, request: Request, caller: Caller) -> Response:
        """Client-side switches; what is absent has the SDK's default."""
        is_mint = request.headers.get(_API_KEY, "").startswith(_MINT_KEY_PREFIX)
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
        return json_response(_DYNAMIC_CONFIG)

    async def auth_token(self, request: Request) -> Response:
        """For a key only: a token that could be had for a token would never end."""
        caller = self._tenants.caller(request)
        return json_response({"jwt": self._signer.jwt(caller.key_id, time.time())})

    async def capabilities(self, request: Request, caller: Caller) -> Response:
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
        return json_response({"type": "finish_session"})

    async def create_sampling_session(self, request: Request, caller: Caller) -> Response:
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

    async def asample(self, request: Request, caller: Caller) -> Response:
        body = parse(await request.body(), Sample)
        model, key, group = self._names(body, request)
        wish = to_generation(
            body, model=model, idempotency_key=key, group=group, settings=self._settings
        )
        caller.sign(wish)
        try:
            accepted = await self._client.submit(wish)
        except HeadwayError as error:
            raise in_clients_words(error, TINKER) from None
        request_id = accepted.request_id
        # distinct, and the same again for a resent request
        sequence_ids = [f"{request_id}:{number}" for number in range(body.num_samples)]
        return json_response({"request_id": request_id, "sample_sequence_ids": sequence_ids})

    def _names(self, body: Sample, request: Request) -> tuple[str, str, str]:
        """Model, idempotency key and group of a sample.

        Resends repeat the number in the sampling session; the header's key changes with each.
        Without a sampling session that key, which stays over quick retries, is all there is.
        """
        if body.sampling_session_id is not None:
            session = self._signer.session(body.sampling_session_id)
            if body.seq_id is None:
                raise invalid("sampling_session_id needs a seq_id.", "seq_id")
            clone = body.seq_id // SEQ_IDS_PER_CLONE
            key = f"tinker:{_signature(body.sampling_session_id)}:{body.seq_id}"
            return session.model, key, _group(body.sampling_session_id, clone)
        model = body.model_path or body.base_model
        if model is None:
            raise invalid("sampling_session_id or base_model is needed.", "sampling_session_id")
        header = request.headers.get("x-idempotency-key")
        return model, f"tinker:{header}" if header else "", ""

    async def retrieve_future(self, request: Request, caller: Caller) -> Response:
        body = parse(await request.body(), Future)
        headers = request.headers
        hold = hold_s(headers, self._settings.tinker_hold_s) if is_sdk_poller(headers) else 0.0
        try:
            outcome = await self._polls.result(request, body.request_id, caller.tenant, hold)
        except HeadwayError as error:
            if error.reason is not Reason.REQUEST_NOT_FOUND or not is_sdk_poller(headers):
                raise
            # It polls for what it was promised, and samples anew after a 410 only.
            message = "This request is gone, with the scheduler that had it."
            raise HeadwayError(Reason.RESULT_EXPIRED, message) from None
        if isinstance(outcome, generation_pb2.GenerationResult):
            max_bytes = self._settings.tinker_announce_bytes if body.allow_metadata_only else None
            return finished(body.request_id, outcome, headers, max_bytes)
        return pending(body.request_id, outcome, headers, self._settings)

    async def retrieve_futures(self, request: Request, caller: Caller) -> Response:
        """Which futures of a clone have ended; held like any poll, or the SDK would never pause."""
        body = parse(await request.body(), Futures)
        target = body.target
        self._signer.session(target.sampling_session_id)
        hold = hold_s(request.headers, self._settings.tinker_hold_s)
        if body.timeout is not None:
            hold = min(hold, body.timeout)
        group = _group(target.sampling_session_id, target.cloned_sampler_id)
        cursor = body.prev_cursor
        answer = await self._polls.finished(request, group, cursor, caller.tenant, hold)
        completions = [
            {"state": "failed", "request_id": one.request_id}
            if one.failed
            else {
                "state": "finished",
                "request_id": one.request_id,
                "response_payload_uncompressed_size": one.num_bytes,
            }
            for one in answer.finished
        ]
        return json_response({"completions": completions, "cursor": answer.cursor})

    async def cancel_future(self, request: Request, caller: Caller) -> Response:
        body = parse(await request.body(), Future)
        await self._client.cancel(body.request_id, caller.tenant)
        return json_response({"type": "cancel_future"})

    async def telemetry(self, request: Request, caller: Caller) -> Response:
        """Read and dropped: it may hold API keys, and nobody here needs it."""
        async for _ in request.stream():
            pass
        return json_response({"status": "accepted"})


def _signature(sampling_session_id: str) -> str:
    """Short, and as unique as the whole id."""
    return sampling_session_id.rpartition(".")[2]


def _group(sampling_session_id: str, clone: int) -> str:
    """What the scheduler calls the futures of one clone of a sampling client."""
    return f"tinker:{_signature(sampling_session_id)}:{clone}"
