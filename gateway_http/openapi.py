"""GET /openapi.json: what the endpoints take and answer, from the very types that check it.

The endpoints are listed in ``openapi_operations``. Bodies come from the structs of the parsers,
failures from the error table (``openapi_failures``), answers from ``openapi_answers``. Anybody may
read it: it says nothing that the source does not.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway_http import openapi_answers as answers
from gateway_http import openapi_openai_answers as openai_answers
from gateway_http.openai_schema import ANY
from gateway_http.openapi_failures import DOOR, KEY, described, named, text_of
from gateway_http.openapi_operations import JSON, OPERATIONS, PATH, STRUCT, Operation

_REFERENCE = "#/components/schemas/{name}"
_ERRORS: dict[str, STRUCT] = {
    "openai": openai_answers.OpenAIError,
    "tinker": answers.TinkerError,
    "plain": answers.PlainError,
}


def routes() -> list[Route]:
    """The document, made once."""
    content = orjson.dumps(document())

    async def openapi(request: Request) -> Response:
        return Response(content, media_type=JSON)

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
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _schemas() -> tuple[dict[STRUCT, Any], dict[str, Any]]:
    structs: list[STRUCT] = list(_ERRORS.values())
    for operation in OPERATIONS:
        found: Sequence[STRUCT | None] = (operation.answer, operation.body)
        found = [*found, *(other.struct for other in operation.others)]
        structs += [struct for struct in found if struct is not None and struct not in structs]
    schemas, components = msgspec.json.schema_components(structs, ref_template=_REFERENCE)
    for struct in structs:
        components[struct.__name__]["properties"].update(_harmless(struct))
    return dict(zip(structs, schemas, strict=True)), components


def _harmless(struct: STRUCT) -> dict[str, Any]:
    """What a body may have that changes nothing."""
    values: dict[str, Any] = getattr(struct, "harmless", {})
    return {
        name: {
            "description": "Changes nothing here.",
            **({} if allowed is ANY else {"enum": [*allowed, None]}),
        }
        for name, allowed in values.items()
    }


def _operation(operation: Operation, schemas: dict[STRUCT, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": f"{operation.method} {operation.path}",
        "summary": operation.summary,
        "tags": [operation.family],
        "security": [] if operation.is_open else [{"bearer": []}, {"x-api-key": []}, {}],
        "parameters": _parameters(operation),
        "responses": _responses(operation, schemas),
    }
    if operation.body is not None:
        content = {JSON: {"schema": schemas[operation.body]}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    text = {"type": "string", "minLength": 1}
    names = re.findall(r"{(\w+)}", operation.path)
    found = [{"name": name, "in": "path", "required": True, "schema": text} for name in names]
    for one in operation.parameters:
        about = {"name": one.name, "in": one.place, "required": one.is_required}
        found.append({**about, **text_of(one)})
    return found


def _responses(operation: Operation, schemas: dict[STRUCT, Any]) -> dict[str, Any]:
    errors = schemas[_ERRORS[operation.family]]
    reasons = operation.failures | DOOR | (frozenset() if operation.is_open else KEY)
    failures = described(reasons, operation.family, {JSON: {"schema": errors}})
    found: dict[str, Any] = {str(status): answer for status, answer in failures.items()}
    for other in operation.others:
        found[str(other.status)] = _either(
            {
                "description": other.struct.__doc__ or "",
                "headers": named(other.told),
                "content": {JSON: {"schema": schemas[other.struct]}},
            },
            failures.get(other.status),
        )
    content: dict[str, Any] = {kind: {} for kind in operation.media}
    if operation.answer is not None:
        content[JSON] = {"schema": schemas[operation.answer]}
    headers = named(operation.told)
    found["200"] = {"description": operation.summary, "headers": headers, "content": content}
    return dict(sorted(found.items()))


def _either(answer: dict[str, Any], failure: dict[str, Any] | None) -> dict[str, Any]:
    """An answer of an endpoint's own, or a failure of the same status: no header is certain."""
    if failure is None:
        return answer
    either = [one["content"][JSON]["schema"] for one in (answer, failure)]
    headers = {
        name: {**header, "required": False}
        for name, header in (answer["headers"] | failure["headers"]).items()
    }
    return {
        "description": f"{answer['description']} Or {failure['description']}.",
        "headers": headers,
        "content": {JSON: {"schema": {"anyOf": either}}},
    }
