"""The Tinker endpoints alone, over a scheduler that plays a script."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.requests import Request
from starlette.routing import Router

from gateway_http.auth import Caller, Tenants
from gateway_http.middleware import ErrorTranslator
from gateway_http.settings import GatewaySettings
from gateway_http.tinker import routes
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2, scheduler_pb2

MODEL = "tiny/model"
SETTINGS = GatewaySettings()

Outcome = generation_pb2.QueueStatus | generation_pb2.GenerationResult | HeadwayError


class ScriptedScheduler:
    """Answers retrieve from a list (the last answer stays); remembers all that it was asked."""

    def __init__(self) -> None:
        self.models = [generation_pb2.ModelCard(name=MODEL, max_context_tokens=4096)]
        # of models that are not served; None: they were
        self.why_not: Reason | None = Reason.MODEL_NOT_FOUND
        self.submitted: list[generation_pb2.GenerationRequest] = []
        self.refusal: HeadwayError | None = None
        self.outcomes: list[Outcome] = []
        self.retrieved: list[tuple[str, str]] = []
        self.waits_s: list[float] = []
        self.cancelled: list[tuple[str, str]] = []
        self.draining = asyncio.Event()
        self.holds = False  # keeps whoever would wait waiting
        self.is_holding = asyncio.Event()
        # by group: request id, whether it failed, bytes
        self.ends: dict[str, list[tuple[str, bool, int]]] = {}
        self.group_waits_s: list[float] = []

    async def submit(self, request: generation_pb2.GenerationRequest) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(request)
        keys = [x.idempotency_key for x in self.submitted]
        number = keys.index(request.idempotency_key) if request.idempotency_key else len(keys)
        return SimpleNamespace(request_id=f"request-{number}", status=waiting(0, 1, 1))

    async def retrieve(
        self, request_id: str, tenant: str, wait_s: float
    ) -> generation_pb2.QueueStatus | generation_pb2.GenerationResult:
        self.retrieved.append((request_id, tenant))
        self.waits_s.append(wait_s)
        if self.holds and wait_s > 0:
            self.is_holding.set()
            await asyncio.Event().wait()
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, HeadwayError):
            raise outcome
        return outcome

    async def cancel(self, request_id: str, tenant: str) -> None:
        self.cancelled.append((request_id, tenant))

    async def wait_finished(
        self, tenant: str, group: str, cursor: int, wait_s: float
    ) -> scheduler_pb2.WaitFinishedResponse:
        self.group_waits_s.append(wait_s)
        ends = self.ends.get(group, [])
        response = scheduler_pb2.WaitFinishedResponse(cursor=len(ends))
        for request_id, failed, num_bytes in ends[cursor:]:
            response.finished.add(request_id=request_id, failed=failed, num_bytes=num_bytes)
        return response

    async def model(self, name: str) -> None:
        if self.why_not is not None:
            raise HeadwayError(self.why_not, "No.")

    async def list_models(self) -> Sequence[generation_pb2.ModelCard]:
        return self.models


class KeyIsTenant:
    """Keys ``tml-<tenant>`` and ``sk-<tenant>`` are good, others are not."""

    is_open = False

    def caller(self, request: Request) -> Caller:
        prefix, _, tenant = request.headers.get("x-api-key", "").partition("-")
        if prefix not in ("tml", "sk"):
            raise HeadwayError(Reason.UNAUTHENTICATED, "Unknown API key.")
        return Caller(tenant, f"key-{tenant}")

    def by_id(self, key_id: str) -> Caller:
        return Caller(key_id.removeprefix("key-"), key_id)


def client_of(
    scheduler: ScriptedScheduler,
    key: str = "tml-alice",
    *,
    is_open: bool = False,
    settings: GatewaySettings = SETTINGS,
) -> httpx.AsyncClient:
    """An HTTP client whose requests end at the handlers, without a socket."""
    tenants = Tenants(SETTINGS) if is_open else KeyIsTenant()
    router = Router(routes(scheduler, settings, tenants))  # type: ignore[arg-type]
    app = ErrorTranslator(router, settings, lambda *_: None, lambda *_: None)
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://gateway/api/v1/",
        headers={"X-API-Key": key},
    )


def waiting(
    position: int, depth: int, wait_s: float | None, retry_after_s: float = 2
) -> generation_pb2.QueueStatus:
    status = generation_pb2.QueueStatus(
        state=generation_pb2.QueueStatus.STATE_WAITING, position=position, depth=depth
    )
    if wait_s is not None:
        status.estimated_wait.FromMilliseconds(int(wait_s * 1000))
    status.retry_after.FromMilliseconds(int(retry_after_s * 1000))
    return status


def running(wait_s: float, num_generated_tokens: int) -> generation_pb2.QueueStatus:
    status = waiting(0, 0, wait_s)
    status.state = generation_pb2.QueueStatus.STATE_RUNNING
    status.num_generated_tokens = num_generated_tokens
    return status


def result(
    *samples: tuple[list[int], list[float]],
    reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_STOP,
) -> generation_pb2.GenerationResult:
    return generation_pb2.GenerationResult(
        samples=[
            generation_pb2.SampleResult(
                token_ids=tokens,
                logprobs=logprobs,
                end=generation_pb2.SequenceEnd(
                    handle=number, num_tokens=len(tokens), reason=reason
                ),
            )
            for number, (tokens, logprobs) in enumerate(samples)
        ]
    )


TWO_SAMPLES = result(([5, 2**31 - 1], [-0.5, -1.25]), ([6], [0.0]))


def failure(reason: Reason, message: str = "It failed.") -> generation_pb2.GenerationResult:
    return generation_pb2.GenerationResult(
        failure=generation_pb2.Failure(reason=reason.value, message=message)
    )
