"""The Tinker endpoints, for the tinker and MinT SDKs: sampling, and futures that say how long.

Nothing is remembered here. Sampling sessions are signed names (tinker_tokens), requests live in
the scheduler, and a resent asample finds its first run by its idempotency key. Sessions and
heartbeats are therefore answered, not kept. What the SDKs need, down to a header, was found with
the real ones; the tests say which rule is for whom.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway_http.auth import Tenants
from gateway_http.client import SchedulerClient
from gateway_http.http_errors import invalid, json_response
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_futures import (
    finished,
    hold_s,
    is_sdk_poller,
    pending,
)
from gateway_http.tinker_schema import (
    CreateSamplingSession,
    Future,
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
_EARLY_PAUSE_S = 1.0
_DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}

Handler = Callable[[Request, str], Awaitable[Response]]


def routes(client: SchedulerClient, settings: GatewaySettings, tenants: Tenants) -> list[Route]:
    """All under /api/v1."""
    door = _Door(client, settings, tenants)
    return [
        Route(f"{_PREFIX}/healthz", door.healthz, methods=["GET"]),
        door.post("client/config", door.client_config),
        door.post("client/dynamic_config", door.dynamic_config),
        door.post("auth/token", door.auth_token),
        door.get("get_server_capabilities", door.capabilities),
        door.post("create_session", door.create_session),
        door.post("session_heartbeat", door.heartbeat),
        door.post("sessions/{session_id}/finish", door.finish_session),
        door.post("create_sampling_session", door.create_sampling_session),
        door.get("samplers/{sampling_session_id}", door.sampler),
        door.post("asample", door.asample),
        door.post("retrieve_future", door.retrieve_future),
        door.post("cancel_future", door.cancel_future),
        door.post("telemetry", door.telemetry),
    ]


class _Door:
    """Handlers take a request and the tenant that its key stands for."""

    def __init__(
        self, client: SchedulerClient, settings: GatewaySettings, tenants: Tenants
    ) -> None:
        self._client = client
        self._settings = settings
        self._tenants = tenants
        self._signer = Signer(settings.signing_secret())

    def post(self, path: str, handler: Handler) -> Route:
        return Route(f"{_PREFIX}/{path}", self._authenticated(handler), methods=["POST"])

    def get(self, path: str, handler: Handler) -> Route:
        return Route(f"{_PREFIX}/{path}", self._authenticated(handler), methods=["GET"])

    def _authenticated(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await handler(request, self._tenant(request))

        return endpoint

    def _tenant(self, request: Request) -> str:
        """The key's, or that of the key for which we gave this JWT.

        An open installation has one tenant, and its signing key may be known to everybody.
        """
        key = request.headers.get(_API_KEY, "")
        if key.startswith(_JWT_PREFIX) and not self._tenants.is_open:
            tenant = self._signer.tenant(key, time.time())
            if tenant is not None:
                return tenant
        return self._tenants.of(request)

    async def healthz(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def client_config(self, request: Request, tenant: str) -> Response:
        """Client-side switches; what is absent has the SDK's default."""
        is_mint = request.headers.get(_API_KEY, "").startswith(_MINT_KEY_PREFIX)
        return json_response({"pjwt_auth_enabled": is_mint})

    async def dynamic_config(self, request: Request, tenant: str) -> Response:
        return json_response(_DYNAMIC_CONFIG)

    async def auth_token(self, request: Request, tenant: str) -> Response:
        return json_response({"jwt": self._signer.jwt(tenant, time.time())})

    async def capabilities(self, request: Request, tenant: str) -> Response:
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

    async def create_session(self, request: Request, tenant: str) -> Response:
        session_id = str(uuid.uuid4())
        return json_response({"type": "create_session", "session_id": session_id})

    async def heartbeat(self, request: Request, tenant: str) -> Response:
        """Sessions are not kept, so none is ever unknown, also after a restart."""
        return json_response({"type": "session_heartbeat"})

    async def finish_session(self, request: Request, tenant: str) -> Response:
        return json_response({"type": "finish_session"})

    async def create_sampling_session(self, request: Request, tenant: str) -> Response:
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
        if not names:
            raise HeadwayError(Reason.NO_CAPACITY, "No executor is attached yet.")
        if model not in names:
            message = "No such model; get_server_capabilities lists those that are served."
            raise HeadwayError(Reason.MODEL_NOT_FOUND, message, field="base_model")

    async def sampler(self, request: Request, tenant: str) -> Response:
        sampler_id = request.path_params["sampling_session_id"]
        session = self._signer.session(sampler_id)
        return json_response({"sampler_id": sampler_id, "base_model": session.model})

    async def asample(self, request: Request, tenant: str) -> Response:
        body = parse(await request.body(), Sample)
        model, key = self._model_and_key(body, request)
        accepted = await self._client.submit(
            to_generation(
                body,
                model=model,
                tenant=tenant,
                idempotency_key=key,
                settings=self._settings,
            )
        )
        request_id = accepted.request_id
        # distinct, and the same again for a resent request
        sequence_ids = [f"{request_id}:{number}" for number in range(body.num_samples)]
        return json_response({"request_id": request_id, "sample_sequence_ids": sequence_ids})

    def _model_and_key(self, body: Sample, request: Request) -> tuple[str, str]:
        """Resends repeat the number in the sampling session; the header's key changes with each.

        Without a sampling session that key, which stays over quick retries, is all there is.
        """
        if body.sampling_session_id is not None:
            session = self._signer.session(body.sampling_session_id)
            if body.seq_id is None:
                raise invalid("sampling_session_id needs a seq_id.", "seq_id")
            signature = body.sampling_session_id.rpartition(".")[2]  # short, and as unique
            return session.model, f"tinker:{signature}:{body.seq_id}"
        model = body.model_path or body.base_model
        if model is None:
            raise invalid("sampling_session_id or base_model is needed.", "sampling_session_id")
        key = request.headers.get("x-idempotency-key")
        return model, f"tinker:{key}" if key else ""

    async def retrieve_future(self, request: Request, tenant: str) -> Response:
        body = parse(await request.body(), Future)
        headers = request.headers
        hold = hold_s(headers, self._settings.tinker_hold_s) if is_sdk_poller(headers) else 0.0
        outcome = await self._hold(request, body.request_id, tenant, hold)
        if isinstance(outcome, generation_pb2.GenerationResult):
            return finished(body.request_id, outcome, headers)
        return pending(body.request_id, outcome, headers, self._settings)

    async def _hold(
        self, request: Request, request_id: str, tenant: str, hold: float
    ) -> generation_pb2.GenerationResult | generation_pb2.QueueStatus | None:
        """Nobody is held who has hung up, or while this gateway shuts down."""
        if not hold:
            return await self._retrieve(request_id, tenant, hold)

        async def hang_up() -> None:
            await request.receive()

        held = asyncio.create_task(self._retrieve(request_id, tenant, hold))
        hung_up = asyncio.create_task(hang_up())
        draining = asyncio.create_task(self._client.draining.wait())
        tasks = (held, hung_up, draining)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not held.done():
                return await self._retrieve(request_id, tenant, 0.0)
            return held.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _retrieve(
        self, request_id: str, tenant: str, hold: float
    ) -> generation_pb2.GenerationResult | generation_pb2.QueueStatus | None:
        """None: the scheduler could not be asked in all this time.

        An SDK repeats a poll that failed with 5xx at once, so an outage is held like any wait; and
        so is an answer that comes too early, from a scheduler with too many waiters.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + hold
        while True:
            try:
                left = max(deadline - clock(), 0.0)
                outcome = await self._client.retrieve(request_id, tenant, left)
                is_result = isinstance(outcome, generation_pb2.GenerationResult)
                if is_result or deadline - clock() < _EARLY_PAUSE_S:
                    return outcome
                pause = _EARLY_PAUSE_S
            except HeadwayError as error:
                if error.retry_after_ms is None:
                    raise
                pause = min(error.retry_after_ms / 1000, deadline - clock())
            if pause <= 0:
                return None
            await asyncio.sleep(pause)

    async def cancel_future(self, request: Request, tenant: str) -> Response:
        body = parse(await request.body(), Future)
        await self._client.cancel(body.request_id, tenant)
        return json_response({"type": "cancel_future"})

    async def telemetry(self, request: Request, tenant: str) -> Response:
        """Read and dropped: it may hold API keys, and nobody here needs it."""
        async for _ in request.stream():
            pass
        return json_response({"status": "accepted"})
