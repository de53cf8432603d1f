"""The Tinker endpoints, for the tinker and MinT SDKs: sampling, and futures that say how long.

Nothing is remembered here. Sampling sessions are signed names (tinker_tokens), requests live in
the scheduler, and a resent asample finds its first run by its idempotency key. What the SDKs need,
down to a header, was found with the real ones; the tests say which rule is for whom.
"""

import time
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway_http.auth import Caller, Tenants
from gateway_http.client import SchedulerClient
from gateway_http.http_errors import invalid, json_response
from gateway_http.refusals import NUMBERED, TINKER, in_clients_words
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_futures import (
    finished,
    hold_s,
    is_sdk_poller,
    pending,
)
from gateway_http.tinker_polls import Polls
from gateway_http.tinker_schema import Future, Futures, Sample, parse, to_generation
from gateway_http.tinker_sessions import API_KEY, SEQ_IDS_PER_CLONE, Sessions
from gateway_http.tinker_tokens import Signer
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

_PREFIX = "/api/v1"
_JWT_PREFIX = "eyJ"

Handler = Callable[[Request, Caller], Awaitable[Response]]


def routes(client: SchedulerClient, settings: GatewaySettings, tenants: Tenants) -> list[Route]:
    """All under /api/v1."""
    signer = Signer(settings.signing_secret())
    door = _Door(tenants, signer)
    sessions = Sessions(client, settings, tenants, signer)
    samples = _Samples(client, settings, signer)
    return [
        Route(f"{_PREFIX}/healthz", sessions.healthz, methods=["GET"]),
        door.post("client/config", sessions.client_config),
        door.post("client/dynamic_config", sessions.dynamic_config),
        Route(f"{_PREFIX}/auth/token", sessions.auth_token, methods=["POST"]),
        door.get("get_server_capabilities", sessions.capabilities),
        door.post("create_session", sessions.create_session),
        door.post("session_heartbeat", sessions.heartbeat),
        door.post("sessions/{session_id}/finish", sessions.finish_session),
        door.post("create_sampling_session", sessions.create_sampling_session),
        door.post("join_sampling_session", sessions.join_sampling_session),
        door.get("samplers/{sampling_session_id}", sessions.sampler),
        door.post("telemetry", sessions.telemetry),
        door.post("asample", samples.asample),
        door.post("retrieve_future", samples.retrieve_future),
        door.post("retrieve_futures", samples.retrieve_futures),
        door.post("cancel_future", samples.cancel_future),
    ]


class _Door:
    """Routes whose handlers take a request and its caller."""

    def __init__(self, tenants: Tenants, signer: Signer) -> None:
        self._tenants = tenants
        self._signer = signer

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
        key = request.headers.get(API_KEY, "")
        if key.startswith(_JWT_PREFIX) and not self._tenants.is_open:
            key_id = self._signer.key_id(key, time.time())
            caller = self._tenants.by_id(key_id) if key_id is not None else None
            if caller is not None:
                return caller
        return self._tenants.caller(request)


class _Samples:
    """What is asked of models, and what came of it."""

    def __init__(self, client: SchedulerClient, settings: GatewaySettings, signer: Signer) -> None:
        self._client = client
        self._settings = settings
        self._signer = signer
        self._polls = Polls(client, settings.tinker_poll_pause_s)

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
            names = TINKER if body.sampling_session_id is None else NUMBERED
            raise in_clients_words(error, names) from None
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


def _signature(sampling_session_id: str) -> str:
    """Short, and as unique as the whole id."""
    return sampling_session_id.rpartition(".")[2]


def _group(sampling_session_id: str, clone: int) -> str:
    """What the scheduler calls the futures of one clone of a sampling client."""
    return f"tinker:{_signature(sampling_session_id)}:{clone}"
