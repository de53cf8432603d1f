"""The tables of refusals name places that there are in a request."""

from collections.abc import Mapping
from typing import Any

import pytest

from gateway_http.refusals import NUMBERED, OPENAI, TINKER, in_clients_words, openai_names
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

ELSEWHERE = {"next_index"}  # a field of commands


@pytest.mark.parametrize("names", [OPENAI, TINKER, NUMBERED])
def test_every_place_is_one_of_a_request(names: Mapping[str, str]) -> None:
    for place in names.keys() - ELSEWHERE:
        message: Any = generation_pb2.GenerationRequest.DESCRIPTOR
        for part in place.split("."):
            assert part in message.fields_by_name, place
            message = message.fields_by_name[part].message_type


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("sampling.stop_strings[2]: must not be empty", "stop: must not be empty"),
        ("sampling.grammar.sequence[0].regex: too long", "tools: too long"),
        ("grammar: unclosed group", "tools: unclosed group"),
        ("logit_bias: a token comes twice", "logit_bias: a token comes twice"),
        ("prompt: is no place", ""),
        ("sampling.min_tokens: is not a name of theirs", ""),
    ],
)
def test_a_place_gives_way_to_the_clients_name(message: str, told: str) -> None:
    error = HeadwayError(Reason.INVALID_REQUEST, message, field="inside")
    found = in_clients_words(error, openai_names("tools"))
    assert found.message == (told or message)
    assert found.field == (told.partition(":")[0] if told else "inside")


def test_only_what_is_wrong_in_itself_is_about_a_parameter() -> None:
    error = HeadwayError(Reason.QUEUE_FULL, "band: is full")
    assert in_clients_words(error, OPENAI) is error
    grammar = HeadwayError(Reason.INVALID_REQUEST, "grammar: unclosed group")
    assert in_clients_words(grammar, openai_names("")) is grammar
