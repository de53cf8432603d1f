"""The openai SDK against real processes: chats, completions, responses, tools and formats."""

from collections.abc import Callable
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

MODEL = "tools"
HI: Any = [{"role": "user", "content": "What does json.dumps do?"}]


class Weather(pydantic.BaseModel):
    """Of a place."""

    place: Literal["Ulm", "Bonn"]
    unit: Literal["C", "F"]


def chat(sdk: openai.OpenAI, **fields: Any) -> Any:
    wish: Any = {"model": MODEL, "messages": HI, "temperature": 0, "max_tokens": 24, **fields}
    return sdk.chat.completions.create(**wish)


def token_ids(sdk: openai.OpenAI, text: str) -> list[int]:
    url = f"{str(sdk.base_url).removesuffix('/v1/')}/tokenize"
    body = {"model": MODEL, "prompt": text}
    answer: dict[str, list[int]] = httpx.post(url, json=body, timeout=60).json()
    return answer["tokens"]


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
    (token_id,) = token_ids(sdk, second.token)
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


def test_prompts_of_every_kind(sdk: openai.OpenAI) -> None:
    wish: Any = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    texts = ["The json module", "import re"]
    ids = [token_ids(sdk, text) for text in texts]

    def told(prompt: Any, **fields: Any) -> list[str]:
        return [one.text for one in sdk.completions.create(prompt=prompt, **wish, **fields).choices]

    first, second = told(texts[0]), told(texts[1])
    assert told(ids[0]) == first
    assert told(texts) == told(ids) == first + second
    assert told(texts, n=2) == first * 2 + second * 2


def test_lengths_and_ends(sdk: openai.OpenAI) -> None:
    whole = chat(sdk, max_tokens=8, extra_body={"return_token_ids": True}).choices[0]
    assert (len(whole.token_ids), whole.finish_reason) == (8, "length")
    ends = {"stop_token_ids": [whole.token_ids[3]], "return_token_ids": True}
    stopped = chat(sdk, extra_body=ends).choices[0]
    assert (stopped.token_ids, stopped.finish_reason) == (whole.token_ids[:4], "stop")
    late = chat(sdk, extra_body={**ends, "min_tokens": 6}).choices[0]
    assert len(late.token_ids) >= 6
    endless = chat(sdk, max_tokens=200, extra_body={"ignore_eos": True})
    assert endless.usage.completion_tokens == 200
    assert chat(sdk, max_tokens=200).usage.completion_tokens < 200
    likeliest = chat(sdk, temperature=2, seed=1, extra_body={"top_k": 1})
    assert likeliest.choices[0].message.content == chat(sdk).choices[0].message.content
    for only in ({"min_p": 1.0}, {"top_p": 0.001}):
        cut = chat(sdk, temperature=2, seed=1, extra_body=only)
        assert cut.choices[0].message.content == chat(sdk).choices[0].message.content


def test_a_final_message_goes_on_and_a_thought_is_told_as_one(sdk: openai.OpenAI) -> None:
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    whole = chat(sdk).choices[0].message.content
    begun = [*HI, {"role": "assistant", "content": whole[:10]}]
    rest = chat(sdk, messages=begun, extra_body=goes_on).choices[0].message.content
    assert (whole[:10] + rest).startswith(whole[:20])
    thinking = [*HI, {"role": "assistant", "content": "<think>"}]
    message = chat(sdk, messages=thinking, extra_body=goes_on).choices[0].message
    assert message.reasoning_content
    assert not message.content
    stream = chat(sdk, messages=thinking, extra_body=goes_on, stream=True)
    deltas = [getattr(chunk.choices[0].delta, "reasoning_content", "") or "" for chunk in stream]
    assert "".join(deltas) == message.reasoning_content


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


@pytest.mark.parametrize("model", ["tools", "coder"])
def test_tools_are_called(sdk: openai.OpenAI, model: str) -> None:
    tool = openai.pydantic_function_tool(Weather)
    wish: Any = {
        "model": model,
        "messages": HI,
        "tools": [tool],
        "max_tokens": 300,
    }
    called = sdk.chat.completions.parse(**wish, tool_choice="required")
    [call] = called.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    assert called.choices[0].finish_reason == "tool_calls"
    named: Any = {"type": "function", "function": {"name": "Weather"}}
    with sdk.chat.completions.stream(**wish, tool_choice=named) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    [call] = message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    messages = [*HI, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert chat(sdk, model=model, messages=messages, tools=[tool]).choices[0].message.content


@pytest.mark.parametrize("model", ["tools", "coder"])
def test_tools_beside_a_format(sdk: openai.OpenAI, model: str) -> None:
    brace, mark = (token_ids(sdk, text)[0] for text in ("{", "<tool_call>"))
    for first, is_call in ((brace, False), (mark, True)):
        reply = sdk.chat.completions.parse(
            model=model,
            messages=HI,
            tools=[openai.pydantic_function_tool(Weather)],
            parallel_tool_calls=False,
            response_format=Weather,
            logit_bias={str(first): 20},
            max_tokens=300,
        )
        message = reply.choices[0].message
        assert bool(message.tool_calls) == is_call
        if message.tool_calls:
            assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather)
            assert not message.content
        else:
            assert isinstance(message.parsed, Weather)


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


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the SDK's own
@pytest.mark.parametrize("write", [lambda one: one, lambda one: one.model_dump()])
def test_answers_come_back_as_the_sdk_writes_them(
    sdk: openai.OpenAI, write: Callable[[pydantic.BaseModel], Any]
) -> None:
    """As a part of the next question, with all that the SDK's own classes know."""
    rain = {"type": "function_call_output", "output": "rain"}
    wish: Any = {"model": MODEL, "max_output_tokens": 300}
    called: Any = sdk.responses.parse(
        input=HI, tools=[openai.pydantic_function_tool(Weather)], tool_choice="required", **wish
    )
    items = [*HI, *map(write, called.output), {**rain, "call_id": called.output[0].call_id}]
    said = sdk.responses.parse(input=items, text_format=Weather, **wish)
    items += [*map(write, said.output), *HI]
    assert sdk.responses.create(input=items, **wish).output_text
    parsed = sdk.chat.completions.parse(
        model=MODEL, messages=HI, response_format=Weather, max_tokens=300
    )
    messages = [*HI, write(parsed.choices[0].message), *HI]
    assert chat(sdk, messages=messages).choices[0].message.content


def test_an_answer_says_where_its_time_went(sdk: openai.OpenAI) -> None:
    timing = chat(sdk, extra_body={"include_timing": True}).timing
    parts = ("queue_place_s", "queue_model_s", "prefill_s", "decode_s")
    assert sum(timing[part] for part in parts) == pytest.approx(timing["total_s"], abs=0.01)
    assert timing["executor_id"] == "executor-1"
