"""The OpenAPI document names every route, every failure, and nothing that is not there."""

import json
import re
from typing import Any

import httpx
import pytest

from gateway_http.app import build_app
from gateway_http.client import SchedulerClient
from gateway_http.openapi import document
from gateway_http.settings import GatewaySettings
from headway.errors import TABLE
from headway.reasons import Reason

METHODS = {"GET", "POST"}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return document()


def test_it_has_the_routes_that_there_are(found: dict[str, Any]) -> None:
    settings = GatewaySettings()
    routes = set()
    found_routes: list[Any] = build_app(SchedulerClient(settings), settings).routes
    for route in found_routes:
        path = re.sub(r":\w+}", "}", route.path)
        routes |= {(path, method) for method in route.methods & METHODS}
    documented = {
        (path, method.upper()) for path, item in found["paths"].items() for method in item
    }
    assert documented == routes


def test_every_reference_leads_somewhere(found: dict[str, Any]) -> None:
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(found))):
        place: Any = found
        for part in reference.split("/"):
            place = place[part]
        assert place


def test_every_failure_of_the_table_is_named(found: dict[str, Any]) -> None:
    for path, item in found["paths"].items():
        for operation in item.values():
            for reason in set(Reason) - {Reason.STALE_LEASE}:
                assert str(TABLE[reason].http_status) in operation["responses"], path
    described = json.dumps(found["components"]["responses"])
    assert all(reason.value in described for reason in set(Reason) - {Reason.STALE_LEASE})
    crowded = found["components"]["responses"]["openai-429"]
    assert crowded["headers"]["retry-after"]["required"]
    assert "retry-after" not in found["components"]["responses"]["openai-400"]["headers"]


def test_bodies_are_the_parsers_own(found: dict[str, Any]) -> None:
    body = found["components"]["schemas"]["CompletionRequest"]
    assert body["required"] == ["model", "prompt"]
    assert body["additionalProperties"] is False
    assert found["components"]["schemas"]["Sample"]["properties"]["num_samples"]["minimum"] == 1


def test_names_of_operations_differ(found: dict[str, Any]) -> None:
    names = [one["operationId"] for item in found["paths"].values() for one in item.values()]
    assert len(set(names)) == len(names) > 30


async def test_it_is_served_without_a_key(asgi: httpx.AsyncClient, found: dict[str, Any]) -> None:
    response = await asgi.get("/openapi.json")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert response.json() == found
