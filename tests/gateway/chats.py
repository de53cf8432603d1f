"""Chats with tools and thoughts: a template, what is asked, and what the answers add up to."""

import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.gateway import tiny_model
from tests.gateway.scripted import ScriptedScheduler
from tests.gateway.scripted_runs import Run

# In the manner of Qwen3's.
TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "<tool_call></tool_call><|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
LLAMA_TEMPLATE = (
    "{% if tools %}<|python_tag|>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/place"}},
            "required": ["place"],
            "$defs": {"place": {"type": "string"}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</tool_call>'
PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": tiny_model.NAME, "messages": [USER], **fields}


def says(text: str) -> Callable[[Run], None]:
    def script(run: Run) -> None:
        for sample in range(len(run.tokens)):
            run.emit([*tiny_model.encode(text), tiny_model.eos_id()], sample)
            run.end(sample, stop_token_id=tiny_model.eos_id())
        run.finish()

    return script


async def ask(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await http.post(PATH, json=chat(**fields))
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def refused(http: httpx.AsyncClient, **fields: Any) -> str:
    response = await http.post(PATH, json=chat(**fields))
    assert response.status_code == 400, response.text
    param: str = response.json()["error"]["param"]
    return param


def events(text: str) -> list[Any]:
    lines = (line.removeprefix("data: ") for line in text.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]


def added_up(chunks: list[Any]) -> dict[str, Any]:
    """A message as clients make it of its deltas."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": {}}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                whole = message["tool_calls"].setdefault(call["index"], {"arguments": ""})
                whole["arguments"] += call["function"]["arguments"]
                if "id" in call:
                    whole |= {"id": call["id"], "name": call["function"]["name"]}
    return message


def prompt_of(scheduler: ScriptedScheduler, number: int = -1) -> str:
    token_ids = scheduler.runs[number].request.prompt_token_ids
    return tiny_model.tokenizer().decode(list(token_ids), skip_special_tokens=False)
