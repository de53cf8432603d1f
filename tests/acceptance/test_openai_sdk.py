"""The openai SDK against real processes: chats, completions, responses, tools and formats.

The model is the built-in one with a chat template that knows tools and thoughts. It knows nothing
of either, but under a grammar it cannot but call a tool.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from bench.stack import ROOT, Stack

BUILTIN = ROOT / "executor_svc" / "builtin_model"
MODEL = "tools"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call></tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
HI: Any = [{"role": "user", "content": "What does json.dumps do?"}]


class Weather(pydantic.BaseModel):
    """Of a place."""

    place: Literal["Ulm", "Bonn"]
    unit: Literal["C", "F"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("model")
    for path in BUILTIN.glob("*"):
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    executor = {"model": f"{MODEL}={folder}"}
    with Stack.start(engine="torch", executor=executor) as stack:
        yield stack


@pytest.fixture
def sdk(stack: Stack) -> Iterator[openai.OpenAI]:
    url = f"{stack.gateway_url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as sdk:
        yield sdk


def chat(sdk: openai.OpenAI, **fields: Any) -> Any:
    wish: Any = {"model": MODEL, "messages": HI, "temperature": 0, "max_tokens": 24, **fields}
    return sdk.chat.completions.create(**wish)


def test_a_stream_says_what_a_body_does(sdk: openai.OpenAI) -> None:
    whole = chat(sdk, n=2, seed=3, temperature=0.7)
    texts = {0: "", 1: ""}
    options = {"include_usage": True}
    for chunk in chat(sdk, n=2, seed=3, temperature=0.7, stream=True, stream_options=options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [one.message.content for one in whole.choices] == [texts[0], texts[1]]
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens


def test_parameters_reach_the_model(sdk: openai.OpenAI) -> None:
    plain = chat(sdk, logprobs=True, top_logprobs=5)
    first = plain.choices[0].logprobs.content[0]
    assert first.logprob == max(top.logprob for top in first.top_logprobs)
    second = first.top_logprobs[1]
    url = f"{str(sdk.base_url).removesuffix('/v1/')}/tokenize"
    answer = httpx.post(url, json={"model": MODEL, "prompt": second.token}).json()
    (token_id,) = answer["tokens"]
    pushed = chat(sdk, logit_bias={token_id: 100}, max_tokens=3)
    assert pushed.choices[0].message.content == second.token * 3
    varied = chat(sdk, logit_bias={token_id: 60}, frequency_penalty=2, presence_penalty=2)
    assert varied.choices[0].finish_reason == "length"
    stopped = chat(sdk, stop=plain.choices[0].message.content[4:9])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == plain.choices[0].message.content[:4]


def test_a_completion_with_its_prompt(sdk: openai.OpenAI) -> None:
    wish: Any = {"model": MODEL, "prompt": "The json module", "temperature": 0, "max_tokens": 5}
    plain = sdk.completions.create(**wish).choices[0].text
    echoed = sdk.completions.create(**wish, echo=True, logprobs=2).choices[0]
    assert echoed.text == "The json module" + plain
    assert echoed.logprobs is not None
    assert echoed.logprobs.token_logprobs is not None
    assert echoed.logprobs.top_logprobs is not None
    assert echoed.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in echoed.logprobs.token_logprobs[1:])
    assert "".join(echoed.logprobs.tokens or ()) == echoed.text
    assert len(echoed.logprobs.top_logprobs) == len(echoed.logprobs.tokens or ())


def test_formats_hold(sdk: openai.OpenAI) -> None:
    parsed = sdk.chat.completions.parse(
        model=MODEL, messages=HI, response_format=Weather, max_tokens=300
    )
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    chosen = chat(sdk, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert chosen.choices[0].message.content in ("yes", "no")
    matched = chat(sdk, extra_body={"structured_outputs": {"regex": "[a-c]{3}-[0-9]"}})
    assert matched.choices[0].message.content[3] == "-"
    response = sdk.responses.parse(
        model=MODEL, input="Hi", text_format=Weather, max_output_tokens=300
    )
    assert isinstance(response.output_parsed, Weather)


def test_tools_are_called(sdk: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    wish: Any = {
        "model": MODEL,
        "messages": HI,
        "tools": [tool],
        "max_tokens": 300,
    }
    called = sdk.chat.completions.parse(**wish, tool_choice="required")
    (call,) = called.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)
    assert called.choices[0].finish_reason == "tool_calls"
    named = {"type": "function", "function": {"name": "Weather"}}
    with sdk.chat.completions.stream(**wish, tool_choice=named) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)
    messages = [
        *HI,
        {
            "role": "assistant",
            "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    assert chat(sdk, messages=messages, tools=[tool]).choices[0].message.content


def test_responses(sdk: openai.OpenAI) -> None:
    wish: Any = {
        "model": MODEL,
        "input": "What is json?",
        "temperature": 0,
        "max_output_tokens": 20,
    }
    whole = sdk.responses.create(**wish)
    assert whole.output_text
    with sdk.responses.stream(**wish) as stream:
        text = "".join(
            event.delta for event in stream if event.type == "response.output_text.delta"
        )
    assert text == whole.output_text
    flat: Any = {
        "type": "function",
        "name": "weather",
        "parameters": Weather.model_json_schema(),
        "strict": True,
    }
    called = sdk.responses.create(
        **{**wish, "max_output_tokens": 300},
        tools=[flat],
        tool_choice="required",
    )
    (item,) = called.output
    assert item.type == "function_call"
    assert Weather.model_validate_json(item.arguments)


def test_an_answer_says_where_its_time_went(sdk: openai.OpenAI) -> None:
    timing = chat(sdk, extra_body={"include_timing": True}).timing
    parts = ("queue_place_s", "queue_model_s", "prefill_s", "decode_s")
    assert sum(timing[part] for part in parts) == pytest.approx(timing["total_s"], abs=0.01)
    assert timing["executor_id"] == "executor-1"


def test_another_gateway_goes_on_when_the_first_is_killed(stack: Stack) -> None:
    first, url = stack.gateway, stack.gateway_url
    body = {"model": MODEL, "messages": HI, "seed": 5, "max_tokens": 200, "ignore_eos": True}
    expected = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    seen, last_id = "", ""
    request = {**body, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=request) as stream:
        path = f"/v1/requests/{stream.headers['x-headway-request-id']}/events"
        headers = {"x-headway-resume": stream.headers["x-headway-resume"]}
        lines = stream.iter_lines()
        while len(seen) < 40:
            line = next(lines)
            if line.startswith("id: "):
                last_id = line.removeprefix("id: ")
            seen += content(line)
        first.kill()
    stack.start_gateway({})
    headers["Last-Event-ID"] = last_id
    rest = httpx.get(stack.gateway_url + path, headers=headers, timeout=60)
    assert rest.status_code == 200, rest.text
    seen += "".join(map(content, rest.text.splitlines()))
    assert seen == expected["choices"][0]["message"]["content"]


def content(line: str) -> str:
    """The text of one line of a stream."""
    if not line.startswith("data: {"):
        return ""
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return "".join(choice["delta"].get("content", "") for choice in choices)
