"""Streams that are continued by their address: at any gateway, after any event."""

from typing import Any

import httpx
import msgspec
import pytest

from gateway_http.client import SchedulerClient
from gateway_http.openai_choice import ReplySpec, decode_spec
from headway.errors import HeadwayError
from tests.gateway import tiny_model
from tests.gateway.chats import CALL, TEMPLATE, WEATHER, added_up, events
from tests.gateway.conftest import serving, settings_for
from tests.gateway.resumed import numbered, streamed, way_back
from tests.gateway.scripted import ScriptedScheduler

CHAT: dict[str, Any] = {
    "model": tiny_model.NAME,
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
}
COMPLETION: dict[str, Any] = {
    "model": tiny_model.NAME,
    "prompt": "the ü",
    "max_tokens": 99,
    "stream": True,
    "return_token_ids": True,
}
TWO_PROMPTS = {"prompt": ["the ü", "fleet"], "n": 2}
LOGPROBS = {"logprobs": 1}


def told(text: str) -> dict[int, list[Any]]:
    """What a completion's events say of each choice: text, tokens, values, ends."""
    choices: dict[int, list[Any]] = {}
    for event in events(text):
        for choice in event["choices"]:
            whole = choices.setdefault(choice["index"], ["", [], [], [], []])
            whole[0] += choice["text"]
            whole[1] += choice.get("token_ids", [])
            for name, values in (choice["logprobs"] or {}).items():
                if name in ("token_logprobs", "text_offset"):
                    whole[2 if name == "text_offset" else 3] += values
            whole[4] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return choices


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


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"n": 3, **LOGPROBS}, ("Grüße, 世界!", "ok", "🙂🙂 STOP not this")),
        ({"n": 2, "echo": True}, ("Grüße", "the queue")),
        ({"n": 2, "echo": True, **LOGPROBS}, ("Grüße", "the queue")),
        (TWO_PROMPTS, ("a", "Grüße", "世界", "ok")),
        ({**TWO_PROMPTS, "echo": True, **LOGPROBS}, ("a", "Grüße", "世界", "ok")),
        ({"echo": True, "max_tokens": 0, **LOGPROBS}, ("x",)),
    ],
    ids=["samples", "echo", "echo-logprobs", "prompts", "prompts-echo-logprobs", "only-echo"],
)
async def test_all_choices_go_on_after_any_event(
    http: httpx.AsyncClient,
    scheduler: ScriptedScheduler,
    changes: dict[str, Any],
    texts: tuple[str, ...],
) -> None:
    body = {**COMPLETION, "stop": "STOP", **changes}
    response = await streamed(http, scheduler, "/v1/completions", body, *texts, key="k")
    path, state = way_back(response)
    whole = told(response.text)
    assert len(whole) == len(texts)
    ids = numbered(response.text)
    assert len(ids) > len(texts)
    assert len({event_id for event_id, _ in ids}) == len(ids)
    for event_id, seen in ids:
        place = {"Last-Event-ID": event_id}
        rest = await http.get(path, headers={**state, **place})
        counts = event_id.rpartition(":")[2].split(",")
        assert len(counts) == len(texts)
        if changes.get("echo") and "0" in counts:
            assert rest.status_code == 400
            assert rest.json()["error"]["param"] == "Last-Event-ID"
        else:
            assert rest.status_code == 200, rest.text
            assert told(seen + rest.text) == whole
            assert not {one for one, _ in numbered(rest.text)} & {one for one, _ in numbered(seen)}
        again = await http.post(
            "/v1/completions", json=body, headers={"Idempotency-Key": "k", **place}
        )
        assert again.status_code == 200, again.text
        assert told(seen + again.text) == whole
    assert len(scheduler.runs) == (2 if "prompt" in changes else 1)


async def test_chats_with_several_samples_go_on(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.chat_template = TEMPLATE
    body = {**CHAT, "tools": [WEATHER], "n": 2}
    texts = (f"<think>\nü\n</think>\nsay {CALL}", "no 🙂")
    response = await streamed(http, scheduler, "/v1/chat/completions", body, *texts)
    path, state = way_back(response)
    for event_id, seen in numbered(response.text)[::5]:
        after = {"after": event_id.rpartition(":")[2]}
        rest = (await http.get(path, params=after, headers=state)).text
        for index in range(2):
            whole, joined = (of_choice(text, index) for text in (response.text, seen + rest))
            assert joined == whole


def of_choice(text: str, index: int) -> dict[str, Any]:
    chunks = [
        {"choices": [one for one in chunk["choices"] if one["index"] == index]}
        for chunk in events(text)
    ]
    return added_up(chunks)


async def test_a_response_goes_on_with_the_very_same_events(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.chat_template = TEMPLATE
    function = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    schema = {"type": "object", "properties": {"a": {"enum": [1, "ü"]}}}
    body = {
        "model": tiny_model.NAME,
        "input": "Hi",
        "instructions": "Be short.",
        "tools": [function],
        "tool_choice": "auto",
        "stream": True,
        "include": ["message.output_text.logprobs"],
    }
    text = f"<think>\nü\n</think>\nsay 🙂 {CALL}"
    response = await streamed(http, scheduler, "/v1/responses", body, text, key="k")
    path, state = way_back(response)
    ids = numbered(response.text)
    assert [event_id for event_id, _ in ids] == [f"run-0:{n}" for n in range(len(ids))]
    assert len(ids) == len(events(response.text)) > 20
    for event_id, seen in ids:
        rest = await http.get(path, headers={**state, "Last-Event-ID": event_id})
        assert seen + rest.text == response.text
    after = await http.get(path, headers=state, params={"after": "9"})
    assert response.text.endswith(after.text)
    assert (await http.get(path, headers=state)).text == response.text
    place = {"Idempotency-Key": "k", "Last-Event-ID": "run-0:9"}
    again = await http.post("/v1/responses", json=body, headers=place)
    assert [event["type"] for event in events(again.text)] == [
        event["type"] for event in events(after.text)
    ]
    with_schema = {
        **body,
        "tools": [],
        "text": {"format": {"type": "json_schema", "name": "a", "schema": schema}},
    }
    response = await streamed(http, scheduler, "/v1/responses", with_schema, "{}")
    path, state = way_back(response)
    rest = await http.get(path, headers=state)
    assert events(rest.text)[-1]["response"]["text"]["format"]["schema"] == schema


async def test_streams_of_very_many_choices_have_no_ids(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    body = {**COMPLETION, "prompt": ["a", "b", "c"], "n": 22, "max_tokens": 1}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert "x-headway-resume" not in response.headers
    assert "id: " not in response.text
    headers = {"Idempotency-Key": "k", "Last-Event-ID": f"run-0:{','.join(['1'] * 66)}"}
    response = await http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Last-Event-ID"


async def test_only_streams_have_a_way_back(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json={**CHAT, "stream": False})
    assert response.status_code == 200
    assert "x-headway-resume" not in response.headers


async def test_a_prompt_that_was_begun_anew_is_not_joined_to_the_others(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    body = {**COMPLETION, "prompt": ["a", "b"]}
    response = await streamed(http, scheduler, "/v1/completions", body, "x", "yy", key="k")
    event_id, _ = numbered(response.text)[0]
    scheduler.runs[1].request.idempotency_key = "forgotten, so it is drawn once more"
    headers = {"Idempotency-Key": "k", "Last-Event-ID": event_id}
    again = await http.post("/v1/completions", json=body, headers=headers)
    assert again.status_code == 410


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
        ("after", "?after=1,1", {}),
        ("after", "?after=", {}),
        ("Last-Event-ID", "", {"Last-Event-ID": "x"}),
        ("Last-Event-ID", "", {"Last-Event-ID": "run-0:1,2"}),
        ("Last-Event-ID", "", {"Last-Event-ID": ":1"}),
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


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 0},
        {"num_samples": 65},
        {"num_samples": 10**9},
        {"stop_strings": [""]},
        {"prompt_tails": []},
        {"prompt_tails": [[]] * 33, "others": ["x"] * 32, "num_samples": 2},
        {"others": ["x"]},
        {"others": [""], "prompt_tails": [[], []]},
        {"num_echo_chars": [1, 2]},
        {"num_echo_chars": [-1]},
        {"said": "{"},
        {"said": "[]"},
    ],
)
def test_a_state_out_of_bounds_is_refused(changes: dict[str, Any]) -> None:
    spec = ReplySpec(kind="response", model="m", created=1)
    assert decode_spec(spec.encode(), "state") == spec
    changed = msgspec.structs.replace(spec, **changes)
    with pytest.raises(HeadwayError):
        decode_spec(changed.encode(), "state")
