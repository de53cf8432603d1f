"""What the events of a stream add up to."""

import json
from typing import Any

from tests.gateway import tiny_model
from tests.gateway.scripted_runs import Run


def chat_events(text: str) -> list[Any]:
    return [
        json.loads(line.removeprefix("data: "))
        for line in text.splitlines()
        if line.startswith("data: {")
    ]


def contents(events: list[Any], index: int = 0) -> str:
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(
        one["delta"].get("content", "") if "delta" in one else one["text"]
        for one in choices
        if one["index"] == index
    )


def encode_events(run: Run, text: str) -> None:
    run.emit(tiny_model.encode(text))
