"""What scheduler and executors refuse is told by the names that the client knows."""

from typing import Any

import httpx
import pytest

from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.chats import TEMPLATE, WEATHER, events
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import Run

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
COMPLETION: tuple[str, dict[str, Any]] = ("/v1/completions", {"prompt": "Hi"})
RESPONSE: tuple[str, dict[str, Any]] = ("/v1/responses", {"input": "Hi"})
FORMAT = {"response_format": {"type": "json_object"}}


def refusal(message: str) -> generation_pb2.Failure:
    return generation_pb2.Failure(reason=Reason.INVALID_REQUEST.value, message=message)


@pytest.mark.parametrize(
    ("message", "told", "param"),
    [
        ("band: must be below 4", "priority: must be below 4", "priority"),
        ("sampling.stop_token_ids: at most 3", "stop_token_ids: at most 3", "stop_token_ids"),
        ("sampling.stop_strings: at most 3", "stop: at most 3", "stop"),
        ("idempotency_key: too long", "Idempotency-Key: too long", "Idempotency-Key"),
        ("group: at most 3", "group: at most 3", None),
        ("Something else.", "Something else.", None),
    ],
)
async def test_fields_have_the_clients_names(
    asgi: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    message: str,
    told: str,
    param: str | None,
) -> None:
    scheduler.refusal = refusal(message)
    path, body = CHAT
    response = await asgi.post(path, json={"model": tiny_model.NAME, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["message"], error["param"]) == (told, param)


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        (CHAT, FORMAT, "response_format"),
        (CHAT, {"structured_outputs": {"regex": "("}}, "structured_outputs"),
        (
            CHAT,
            {"structured_outputs": {"json": {}}, "response_format": {"type": "text"}},
            "structured_outputs",
        ),
        (CHAT, {**FORMAT, "structured_outputs": {}}, "response_format"),
        (CHAT, {"tools": [WEATHER], "tool_choice": "required"}, "tools"),
        (COMPLETION, FORMAT, "response_format"),
        (RESPONSE, {"text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)
async def test_a_grammar_has_the_name_of_whoever_asked_for_it(
    asgi: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    endpoint: tuple[str, dict[str, Any]],
    fields: dict[str, Any],
    param: str,
) -> None:
    def fail(run: Run) -> None:
        run.finish(refusal("grammar: unclosed group"))

    scheduler.script = fail
    scheduler.chat_template = TEMPLATE
    path, body = endpoint
    body = {"model": tiny_model.NAME, **body, **fields}
    response = await asgi.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["message"], error["param"]) == (f"{param}: unclosed group", param)
    streamed = await asgi.post(path, json={**body, "stream": True})
    last = events(streamed.text)[-1]
    told = last["error"] if "error" in last else last["response"]["error"]
    assert told["message"] == f"{param}: unclosed group"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/models", None, 200),
        ("GET", f"/v1/models/{tiny_model.NAME}", None, 200),
        ("GET", "/v1/models/none", None, 404),
        ("POST", "/tokenize", {"model": tiny_model.NAME, "prompt": "a"}, 200),
        ("POST", "/detokenize", {"model": tiny_model.NAME, "tokens": [-1]}, 400),
        ("POST", CHAT[0], {"model": tiny_model.NAME, **CHAT[1]}, 200),
        ("POST", CHAT[0], {"model": tiny_model.NAME, **CHAT[1], "stream": True}, 200),
        ("POST", RESPONSE[0], {"model": "none", **RESPONSE[1]}, 404),
        ("GET", "/v1/requests/x/events", None, 400),
    ],
)
async def test_every_answer_says_the_callers_id_back(
    asgi: httpx.AsyncClient, method: str, path: str, body: Any, status: int
) -> None:
    headers = {"x-request-id": "mine"}
    response = await asgi.request(method, path, json=body, headers=headers)
    assert response.status_code == status, response.text
    assert response.headers.get_list("x-request-id") == ["mine"]
