"""Every endpoint of the gateway, for the OpenAPI document."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from gateway_http import openapi_answers as answers
from gateway_http import openapi_openai_answers as openai_answers
from gateway_http.monitor.data import MonitorData
from gateway_http.openai_chat_schema import ChatRequest, DetokenizeRequest, TokenizeRequest
from gateway_http.openai_responses_schema import ResponsesRequest
from gateway_http.openai_schema import CompletionRequest
from gateway_http.openapi_failures import (
    FOLLOWS,
    GENERATES,
    LOOKS,
    NAMED_MODEL,
    NAMED_REQUEST,
    RETRIEVES,
    SUBMITS,
    TEXT,
    Reasons,
)
from gateway_http.openapi_parameters import (
    CALL_NAMED,
    CALLERS_ID,
    PLACES,
    POLLS,
    QUEUE_TOLD,
    READ_TIMEOUT,
    SAMPLE_KEY,
    WAY_BACK,
    WISHES,
    Parameter,
)
from gateway_http.tinker_futures import PROTOBUF
from gateway_http.tinker_schema import (
    CreateSamplingSession,
    Future,
    Futures,
    JoinSamplingSession,
    Sample,
)

PATH = "/openapi.json"
JSON, _EVENTS, _HTML, _TEXT = "application/json", "text/event-stream", "text/html", "text/plain"
STRUCT = type[msgspec.Struct]
_PENDING = 408


class Other(NamedTuple):
    """An answer of another status than 200, and its headers."""

    status: int
    struct: STRUCT
    told: tuple[Parameter, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    ``failures`` may come instead of its answer, and those of the door and of keys at any time, in
    the words of ``family``. ``media`` are further kinds that the answer may have, ``others``
    answers of other statuses. ``told`` are headers of the answer.
    """

    method: str
    path: str
    summary: str
    family: str
    answer: STRUCT | None = None
    body: STRUCT | None = None
    media: tuple[str, ...] = ()
    is_open: bool = False
    failures: Reasons = frozenset()
    others: tuple[Other, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    told: tuple[Parameter, ...] = ()


_GENERATES: dict[str, Any] = {
    "media": (_EVENTS,),
    "parameters": WISHES,
    "told": WAY_BACK,
    "failures": GENERATES,
}


def _openai(
    method: str,
    path: str,
    summary: str,
    parameters: tuple[Parameter, ...] = (),
    told: tuple[Parameter, ...] = (),
    **rest: Any,
) -> Operation:
    parameters, told = (CALLERS_ID, *parameters), (CALL_NAMED, *told)
    return Operation(method, path, summary, "openai", parameters=parameters, told=told, **rest)


def _tinker(method: str, path: str, summary: str, **rest: Any) -> Operation:
    return Operation(method, f"/api/v1/{path}", summary, "tinker", **rest)


def _plain(method: str, path: str, summary: str, **rest: Any) -> Operation:
    return Operation(method, path, summary, "plain", **rest)


_HEALTH: dict[str, Any] = {
    "answer": answers.Health,
    "others": (Other(503, answers.Health),),
    "is_open": True,
}
# The page holds nothing, and where there is no monitor there is no page.
_PAGE: dict[str, Any] = {"media": (_HTML,), "is_open": True, "failures": NAMED_REQUEST}
_FIGURES: dict[str, Any] = {"answer": MonitorData, "failures": NAMED_REQUEST | LOOKS}
OPERATIONS: tuple[Operation, ...] = (
    _plain("get", "/health", "Whether any executor is live.", **_HEALTH),
    _plain("get", "/health/", "The same.", **_HEALTH),
    _plain(
        "get",
        "/ready",
        "Whether this gateway can take work.",
        answer=answers.Ready,
        others=(Other(503, answers.Ready),),
        is_open=True,
    ),
    _plain("get", PATH, "This document.", media=(JSON,), is_open=True),
    _plain("get", "/metrics", "Figures for Prometheus.", media=(_TEXT,), failures=NAMED_REQUEST),
    _plain("get", "/monitor", "A page that shows queue and fleet.", **_PAGE),
    _plain("get", "/monitor/", "The same.", **_PAGE),
    _plain("get", "/monitor/data", "What the page shows.", **_FIGURES),
    _plain("get", "/monitor/data/", "The same.", **_FIGURES),
    _openai(
        "post",
        "/v1/chat/completions",
        "The next turn of a chat; streamed as events if asked to.",
        body=ChatRequest,
        answer=openai_answers.ChatCompletion,
        **_GENERATES,
    ),
    _openai(
        "post",
        "/v1/completions",
        "The continuation of texts or token ids; streamed as events if asked to.",
        body=CompletionRequest,
        answer=openai_answers.TextCompletion,
        **_GENERATES,
    ),
    _openai(
        "post",
        "/v1/responses",
        "A chat by the Responses API; nothing is stored.",
        body=ResponsesRequest,
        answer=openai_answers.ResponseObject,
        **_GENERATES,
    ),
    _openai(
        "get",
        "/v1/requests/{request_id}/events",
        "The rest of a stream, behind the event whose id ends in `after`.",
        media=(_EVENTS,),
        parameters=PLACES,
        told=WAY_BACK,
        failures=FOLLOWS,
    ),
    _openai(
        "get",
        "/v1/models",
        "The models that can be asked for now.",
        answer=openai_answers.ModelList,
        failures=LOOKS,
    ),
    _openai(
        "get",
        "/v1/models/{name}",
        "One of them.",
        answer=openai_answers.Model,
        failures=NAMED_MODEL,
    ),
    _openai(
        "post",
        "/tokenize",
        "Token ids of a text or chat.",
        body=TokenizeRequest,
        answer=openai_answers.Tokens,
        failures=TEXT,
    ),
    _openai(
        "post",
        "/detokenize",
        "The text of token ids.",
        body=DetokenizeRequest,
        answer=openai_answers.Detokenized,
        failures=NAMED_MODEL,
    ),
    _tinker("get", "healthz", "Alive.", answer=answers.TinkerStatus, is_open=True),
    _tinker("post", "client/config", "Switches of the SDK.", answer=answers.ClientConfig),
    _tinker(
        "post", "client/dynamic_config", "Switches to read again.", answer=answers.DynamicConfig
    ),
    _tinker("post", "auth/token", "A token for an API key.", answer=answers.Token),
    _tinker(
        "get",
        "get_server_capabilities",
        "Models served.",
        answer=answers.Capabilities,
        failures=LOOKS,
    ),
    _tinker("post", "create_session", "A session.", answer=answers.Session),
    _tinker("post", "session_heartbeat", "A session lives on.", answer=answers.Typed),
    _tinker("post", "sessions/{session_id}/finish", "A session ends.", answer=answers.Typed),
    _tinker(
        "post",
        "create_sampling_session",
        "A name to sample a model by.",
        body=CreateSamplingSession,
        answer=answers.SamplingSessionMade,
        failures=NAMED_MODEL,
    ),
    _tinker(
        "post",
        "join_sampling_session",
        "A number for a clone of a sampling client.",
        body=JoinSamplingSession,
        answer=answers.Joined,
        failures=NAMED_REQUEST,
    ),
    _tinker(
        "get",
        "samplers/{sampling_session_id}",
        "What it samples.",
        answer=answers.Sampler,
        failures=NAMED_REQUEST,
    ),
    _tinker(
        "post",
        "asample",
        "Samples, as a future.",
        body=Sample,
        answer=answers.Promise,
        parameters=(SAMPLE_KEY,),
        failures=SUBMITS | NAMED_REQUEST,
    ),
    _tinker(
        "post",
        "retrieve_future",
        "A future's result, or where it stands.",
        body=Future,
        media=(JSON, PROTOBUF),
        others=(Other(_PENDING, answers.Pending, QUEUE_TOLD),),
        parameters=POLLS,
        failures=RETRIEVES,
    ),
    _tinker(
        "post",
        "retrieve_futures",
        "Which futures have ended; waits for one.",
        body=Futures,
        answer=answers.Completions,
        parameters=(READ_TIMEOUT,),
        failures=LOOKS | NAMED_REQUEST,
    ),
    _tinker(
        "post",
        "cancel_future",
        "End a future.",
        body=Future,
        answer=answers.Typed,
        failures=LOOKS,
    ),
    _tinker("post", "telemetry", "Read and dropped.", answer=answers.TinkerStatus),
)
