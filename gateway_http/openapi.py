"""GET /openapi.json: what the endpoints take and answer, from the very types that check it.

Bodies come from the structs of the parsers, failures from the error table, answers from
``openapi_answers``. Anybody may read it: it says nothing that the source does not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway_http import openapi_answers as answers
from gateway_http.monitor.data import MonitorData
from gateway_http.openai_chat_schema import ChatRequest, DetokenizeRequest, TokenizeRequest
from gateway_http.openai_responses_schema import ResponsesRequest
from gateway_http.openai_schema import CompletionRequest
from gateway_http.tinker_futures import PROTOBUF
from gateway_http.tinker_schema import (
    CreateSamplingSession,
    Future,
    Futures,
    JoinSamplingSession,
    Sample,
)
from headway.errors import TABLE
from headway.reasons import Reason

PATH = "/openapi.json"
_REFERENCE = "#/components/schemas/{name}"
_JSON, _EVENTS, _HTML, _TEXT = "application/json", "text/event-stream", "text/html", "text/plain"
_NOT_OVER_HTTP = (Reason.STALE_LEASE,)
_STRUCT = type[msgspec.Struct]
_ERRORS: dict[str, _STRUCT] = {
    "openai": answers.OpenAIError,
    "tinker": answers.TinkerError,
    "plain": answers.PlainError,
}
_PENDING = 408


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    Beside its answer every failure of the error table may come, in the words of ``family``.
    ``media`` are further kinds that the answer may have, ``others`` answers of other statuses.
    ``query``: the names of parameters, and a pattern for each.
    """

    method: str
    path: str
    summary: str
    family: str
    answer: _STRUCT | None = None
    body: _STRUCT | None = None
    media: tuple[str, ...] = ()
    is_open: bool = False
    others: tuple[tuple[int, _STRUCT], ...] = ()
    query: tuple[tuple[str, str], ...] = ()


def _openai(method: str, path: str, summary: str, **rest: Any) -> Operation:
    return Operation(method, path, summary, "openai", **rest)


def _tinker(method: str, path: str, summary: str, **rest: Any) -> Operation:
    return Operation(method, f"/api/v1/{path}", summary, "tinker", **rest)


def _plain(method: str, path: str, summary: str, **rest: Any) -> Operation:
    return Operation(method, path, summary, "plain", **rest)


_HEALTH: dict[str, Any] = {
    "answer": answers.Health,
    "others": ((503, answers.Health),),
    "is_open": True,
}
OPERATIONS: tuple[Operation, ...] = (
    _plain("get", "/health", "Whether any executor is live.", **_HEALTH),
    _plain("get", "/health/", "The same.", **_HEALTH),
    _plain(
        "get",
        "/ready",
        "Whether this gateway can take work.",
        answer=answers.Ready,
        others=((503, answers.Ready),),
        is_open=True,
    ),
    _plain("get", PATH, "This document.", media=(_JSON,), is_open=True),
    _plain("get", "/metrics", "Figures for Prometheus.", media=(_TEXT,)),
    _plain("get", "/monitor", "A page that shows queue and fleet.", media=(_HTML,)),
    _plain("get", "/monitor/", "The same.", media=(_HTML,)),
    _plain("get", "/monitor/data", "What the page shows.", answer=MonitorData),
    _plain("get", "/monitor/data/", "The same.", answer=MonitorData),
    _openai(
        "post",
        "/v1/chat/completions",
        "The next turn of a chat; streamed as events if asked to.",
        body=ChatRequest,
        answer=answers.ChatCompletion,
        media=(_EVENTS,),
    ),
    _openai(
        "post",
        "/v1/completions",
        "The continuation of texts or token ids; streamed as events if asked to.",
        body=CompletionRequest,
        answer=answers.TextCompletion,
        media=(_EVENTS,),
    ),
    _openai(
        "post",
        "/v1/responses",
        "A chat by the Responses API; nothing is stored.",
        body=ResponsesRequest,
        answer=answers.ResponseObject,
        media=(_EVENTS,),
    ),
    _openai(
        "get",
        "/v1/requests/{request_id}/events",
        "The rest of a stream, behind the event whose id ends in `after`.",
        media=(_EVENTS,),
        query=(("after", r"^[0-9]{1,9}(,[0-9]{1,9})*$"),),
    ),
    _openai("get", "/v1/models", "The models that can be asked for now.", answer=answers.ModelList),
    _openai("get", "/v1/models/{name}", "One of them.", answer=answers.Model),
    _openai(
        "post",
        "/tokenize",
        "Token ids of a text or chat.",
        body=TokenizeRequest,
        answer=answers.Tokens,
    ),
    _openai(
        "post",
        "/detokenize",
        "The text of token ids.",
        body=DetokenizeRequest,
        answer=answers.Detokenized,
    ),
    _tinker("get", "healthz", "Alive.", answer=answers.TinkerStatus, is_open=True),
    _tinker("post", "client/config", "Switches of the SDK.", answer=answers.ClientConfig),
    _tinker(
        "post", "client/dynamic_config", "Switches to read again.", answer=answers.DynamicConfig
    ),
    _tinker("post", "auth/token", "A token for an API key.", answer=answers.Token),
    _tinker("get", "get_server_capabilities", "Models served.", answer=answers.Capabilities),
    _tinker("post", "create_session", "A session.", answer=answers.Session),
    _tinker("post", "session_heartbeat", "A session lives on.", answer=answers.Typed),
    _tinker("post", "sessions/{session_id}/finish", "A session ends.", answer=answers.Typed),
    _tinker(
        "post",
        "create_sampling_session",
        "A name to sample a model by.",
        body=CreateSamplingSession,
        answer=answers.SamplingSessionMade,
    ),
    _tinker(
        "post",
        "join_sampling_session",
        "A number for a clone of a sampling client.",
        body=JoinSamplingSession,
        answer=answers.Joined,
    ),
    _tinker("get", "samplers/{sampling_session_id}", "What it samples.", answer=answers.Sampler),
    _tinker("post", "asample", "Samples, as a future.", body=Sample, answer=answers.Promise),
    _tinker(
        "post",
        "retrieve_future",
        "A future's result, or where it stands.",
        body=Future,
        media=(_JSON, PROTOBUF),
        others=((_PENDING, answers.Pending),),
    ),
    _tinker(
        "post",
        "retrieve_futures",
        "Which futures have ended; waits for one.",
        body=Futures,
        answer=answers.Completions,
    ),
    _tinker("post", "cancel_future", "End a future.", body=Future, answer=answers.Typed),
    _tinker("post", "telemetry", "Read and dropped.", answer=answers.TinkerStatus),
)


def routes() -> list[Route]:
    """The document, made once."""
    content = orjson.dumps(document())

    async def openapi(request: Request) -> Response:
        return Response(content, media_type=_JSON)

    return [Route(PATH, openapi, methods=["GET"])]


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    schemas, components = _schemas()
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headway",
            "version": "1",
            "description": "The queue in front of a GPU fleet: samples from language models.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {
                f"{family}-{status}": answer
                for family, struct in _ERRORS.items()
                for status, answer in _failures(schemas[struct]).items()
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _schemas() -> tuple[dict[_STRUCT, Any], dict[str, Any]]:
    structs: list[_STRUCT] = list(_ERRORS.values())
    for operation in OPERATIONS:
        found: Sequence[_STRUCT | None] = (operation.answer, operation.body)
        found = [*found, *(struct for _, struct in operation.others)]
        structs += [struct for struct in found if struct is not None and struct not in structs]
    schemas, components = msgspec.json.schema_components(structs, ref_template=_REFERENCE)
    return dict(zip(structs, schemas, strict=True)), components


def _operation(operation: Operation, schemas: dict[_STRUCT, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": f"{operation.method} {operation.path}",
        "summary": operation.summary,
        "tags": [operation.family],
        "security": [] if operation.is_open else [{"bearer": []}, {"x-api-key": []}, {}],
        "parameters": _parameters(operation),
        "responses": _responses(operation, schemas),
    }
    if operation.body is not None:
        content = {_JSON: {"schema": schemas[operation.body]}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    text = {"type": "string", "minLength": 1}
    names = re.findall(r"{(\w+)}", operation.path)
    return [{"name": name, "in": "path", "required": True, "schema": text} for name in names] + [
        {"name": name, "in": "query", "schema": {"type": "string", "pattern": pattern}}
        for name, pattern in operation.query
    ]


def _responses(operation: Operation, schemas: dict[_STRUCT, Any]) -> dict[str, Any]:
    family = f"#/components/responses/{operation.family}"
    found: dict[str, Any] = {
        str(status): {"$ref": f"{family}-{status}"} for status in _failures({})
    }
    for status, struct in operation.others:
        other = {_JSON: {"schema": schemas[struct]}}
        found[str(status)] = {"description": struct.__doc__ or "", "content": other}
    content: dict[str, Any] = {kind: {} for kind in operation.media}
    if operation.answer is not None:
        content[_JSON] = {"schema": schemas[operation.answer]}
    found["200"] = {"description": operation.summary, "content": content}
    return dict(sorted(found.items()))


def _failures(schema: dict[str, Any]) -> dict[int, Any]:
    """The error table's answers by status, with a body of this schema."""
    found: dict[int, Any] = {}
    for reason, row in TABLE.items():
        if reason not in _NOT_OVER_HTTP:
            answer = found.setdefault(row.http_status, {"content": {_JSON: {"schema": schema}}})
            words = [*answer.get("description", "").split(", "), reason.value]
            answer["description"] = ", ".join(filter(None, words))
            answer["headers"] = _failure_headers(is_retryable=row.is_retryable)
    return found


def _failure_headers(*, is_retryable: bool) -> dict[str, Any]:
    should = {"schema": {"enum": ["true" if is_retryable else "false"]}, "required": True}
    headers: dict[str, Any] = {"x-should-retry": should}
    if is_retryable:
        headers["retry-after"] = {"schema": {"type": "integer", "minimum": 1}, "required": True}
    return headers
