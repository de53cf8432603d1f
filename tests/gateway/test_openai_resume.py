"""Streams that are continued by their address: at any gateway, after any event."""

from typing import Any

import httpx
import pytest

from gateway_http.client import SchedulerClient
from gateway_http.openai_choice import ReplySpec, decode_spec
from headway.errors import HeadwayError
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.conftest import serving, settings_for
from tests.gateway.scripted import ScriptedScheduler, leave_alone
from tests.gateway.test_openai_chat import CALL, TEMPLATE, WEATHER, added_up, events

CHAT: dict[str, Any] = {
    "model": tiny_model.NAME,
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
}


def way_back(response: httpx.Response) -> tuple[str, dict[str, str]]:
    """Where the rest of a stream is, and the header that it takes."""
    name = response.headers["x-headway-request-id"]
    state = response.headers["x-headway-resume"]
    return f"/v1/requests/{name}/events", {"x-headway-resume": state}


async def streamed(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, path: str, body: Any, text: str
) -> httpx.Response:
    """A whole stream, one event for each token."""
    scheduler.script = leave_alone
    async with http.stream("POST", path, json=body) as response:
        run = await scheduler.run()
        for token_id in tiny_model.encode(text):
            run.emit([token_id])
            scheduler.publish()
        run.end(reason=generation_pb2.FINISH_REASON_LENGTH)
        run.finish()
        scheduler.publish()
        await response.aread()
    return response


async def test_any_other_gateway_goes_on_after_any_event(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.chat_template = TEMPLATE
    options = {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 1}
    body = {**CHAT, "tools": [WEATHER], "stop": "STOP", **options}
    text = f"<think>\nü\n</think>\nsay ST {CALL}"
    response = await streamed(http, scheduler, "/v1/chat/completions", body, text)
    path, state = way_back(response)
    whole = added_up(events(response.text))
    assert whole["tool_calls"][0]["name"] == "weather"
    blocks = response.text.split("\n\n")
    numbered = [number for number, block in enumerate(blocks) if block.startswith("id: ")]
    assert len(numbered) > 20
    settings = settings_for(scheduler)
    async with (
        SchedulerClient(settings).running() as client,
        serving(client, settings) as url,
        httpx.AsyncClient(base_url=url) as other,
    ):
        for number in numbered[:: len(numbered) // 12]:
            event_id = blocks[number].splitlines()[0].removeprefix("id: ")
            seen = "\n\n".join(blocks[: number + 1])
            rest = await other.get(path, headers={**state, "Last-Event-ID": event_id})
            assert rest.status_code == 200, rest.text
            assert added_up(events(seen) + events(rest.text)) == whole
            assert way_back(rest) == (path, state)
            after = {"after": event_id.rpartition(":")[2]}
            by_number = await other.get(path, params=after, headers=state)
            assert events(by_number.text) == events(rest.text)
            assert events(rest.text)[-1]["usage"]["completion_tokens"] > 0
        anew = await other.get(path, headers=state)
        assert added_up(events(anew.text)) == whole
    assert len(scheduler.runs) == 1
    assert scheduler.cancelled == []


async def test_a_completion_goes_on_behind_its_prompt(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    body = {"model": tiny_model.NAME, "prompt": "a 🙂", "max_tokens": 99, "stream": True}
    response = await streamed(http, scheduler, "/v1/completions", body, "Grüße!")
    path, state = way_back(response)
    rest = await http.get(path, params={"after": "3"}, headers=state)
    whole, tail = (
        "".join(event["choices"][0]["text"] for event in events(text))
        for text in (response.text, rest.text)
    )
    assert whole == "Grüße!"
    assert whole.endswith(tail)
    assert 0 < len(tail) < len(whole)


@pytest.mark.parametrize("changes", [{"n": 2}, {"stream": False}])
async def test_only_streams_of_one_choice_have_a_way_back(
    http: httpx.AsyncClient, changes: dict[str, Any]
) -> None:
    response = await http.post("/v1/chat/completions", json={**CHAT, **changes})
    assert response.status_code == 200
    assert "x-headway-resume" not in response.headers


async def test_a_state_that_is_too_long_for_a_header_is_left_out(
    http: httpx.AsyncClient,
) -> None:
    stops = [f"{number:0256}" for number in range(16)]
    response = await http.post("/v1/chat/completions", json={**CHAT, "stop": stops})
    assert response.status_code == 200
    assert "x-headway-resume" not in response.headers


async def test_a_request_that_nobody_knows(asgi: httpx.AsyncClient) -> None:
    headers = {
        "x-headway-resume": ReplySpec(kind="chat", model=tiny_model.NAME, created=1).encode()
    }
    response = await asgi.get("/v1/requests/no-such/events", headers=headers)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "request_not_found"


@pytest.mark.parametrize("state", ["", "x", "!", "A" * 40_000])
async def test_a_way_back_that_is_none(asgi: httpx.AsyncClient, state: str) -> None:
    headers = {"x-headway-resume": state}
    response = await asgi.get("/v1/requests/run-0/events", headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-headway-resume"


@pytest.mark.parametrize(
    ("param", "query", "headers"),
    [
        ("after", "?after=-1", {}),
        ("after", "?after=x", {}),
        ("Last-Event-ID", "", {"Last-Event-ID": "x"}),
    ],
)
async def test_a_place_that_is_none(
    asgi: httpx.AsyncClient, param: str, query: str, headers: dict[str, str]
) -> None:
    state = ReplySpec(kind="chat", model=tiny_model.NAME, created=1).encode()
    headers = {**headers, "x-headway-resume": state}
    response = await asgi.get(f"/v1/requests/run-0/events{query}", headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_an_event_of_another_request_is_no_place_in_this_one(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    response = await http.post("/v1/chat/completions", json=CHAT)
    path, state = way_back(response)
    response = await http.get(path, headers={**state, "Last-Event-ID": "run-7:3"})
    assert response.status_code == 410


def test_a_state_with_samples_or_stops_out_of_bounds_is_refused() -> None:
    for changes in ({"num_samples": 0}, {"num_samples": 10**9}, {"stop_strings": [""]}):
        spec = ReplySpec(kind="chat", model="m", created=1, **changes)  # type: ignore[arg-type]
        with pytest.raises(HeadwayError):
            decode_spec(spec.encode(), "state")
