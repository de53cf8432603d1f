"""What a request may ask for besides plain sampling: bad fields are named, good ones pass."""

import math
from typing import Any

import pytest

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2 as generation
from scheduler_svc import translate
from scheduler_svc.core import messages
from scheduler_svc.settings import SchedulerSettings
from tests.scheduler.world import CARD, body

SETTINGS = SchedulerSettings(
    max_name_chars=16,
    max_logit_bias=3,
    max_grammar_bytes=200,
    max_grammar_parts=3,
    max_regex_bytes=20,
    max_choices=3,
    max_prompt_alternatives=4,
)


def check(
    settings: SchedulerSettings = SETTINGS, **overrides: Any
) -> tuple[messages.Request, generation.GenerationRequest]:
    return translate.request_from_proto(body(**overrides), CARD, settings)


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": fields}


def bias(*pairs: tuple[int, float]) -> dict[str, Any]:
    return sampling(
        logit_bias=[generation.LogitBias(token_id=token, bias=value) for token, value in pairs]
    )


def grammar(**fields: Any) -> dict[str, Any]:
    return sampling(grammar=generation.Grammar(**fields))


def choice(*texts: str) -> dict[str, Any]:
    return grammar(choice=generation.Choice(texts=texts))


def scoring(**fields: Any) -> dict[str, Any]:
    return {"prompt_scoring": generation.PromptScoring(**fields)}


def targets(*offsets: int, tokens: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return scoring(target_offsets=offsets, target_token_ids=tokens)


def limited(**fields: Any) -> dict[str, Any]:
    return {"quota": generation.Quota(**fields)}


REGEX = generation.Grammar(regex="a")


def parts(*grammars: generation.Grammar) -> generation.Grammars:
    return generation.Grammars(grammars=grammars)


def repetition(**fields: int) -> dict[str, Any]:
    return grammar(repetition=generation.Repetition(grammar=REGEX, **fields))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"group": "x" * 17}, "group"),
    (limited(key_id="x" * 17), "quota.key_id"),
    (limited(requests_per_s=-1), "quota.requests_per_s"),
    (limited(requests_per_s=math.nan), "quota.requests_per_s"),
    (limited(requests_per_s=math.inf), "quota.requests_per_s"),
    (sampling(top_logprobs=1), "sampling.top_logprobs"),
    (sampling(logprobs=True, top_logprobs=21), "sampling.top_logprobs"),
    (sampling(presence_penalty=2.1), "sampling.presence_penalty"),
    (sampling(presence_penalty=math.nan), "sampling.presence_penalty"),
    (sampling(frequency_penalty=-2.1), "sampling.frequency_penalty"),
    (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=-1.0), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=math.nan), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=math.inf), "sampling.repetition_penalty"),
    (bias((1_000, 1.0)), "sampling.logit_bias"),
    (bias((1, 1.0), (1, 2.0)), "sampling.logit_bias"),
    (bias((1, 100.5)), "sampling.logit_bias"),
    (bias((1, math.nan)), "sampling.logit_bias"),
    (bias((1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0)), "sampling.logit_bias"),
    (grammar(), "sampling.grammar"),
    (grammar(json_object=False), "sampling.grammar.json_object"),
    (grammar(json_schema=""), "sampling.grammar.json_schema"),
    (grammar(json_schema="{"), "sampling.grammar.json_schema"),
    (grammar(json_schema="[1]"), "sampling.grammar.json_schema"),
    (grammar(json_schema='{"title": "' + "x" * 200 + '"}'), "sampling.grammar"),
    (grammar(regex=""), "sampling.grammar.regex"),
    (grammar(regex="é" * 11), "sampling.grammar.regex"),
    (choice(), "sampling.grammar.choice"),
    (choice(""), "sampling.grammar.choice"),
    (choice("a", "b", "a"), "sampling.grammar.choice"),
    (choice("a", "b", "c", "d"), "sampling.grammar.choice"),
    (choice("x" * 200), "sampling.grammar"),
    (grammar(sequence=parts()), "sampling.grammar.sequence"),
    (grammar(any_of=parts(REGEX, generation.Grammar())), "sampling.grammar.any_of[1]"),
    (grammar(any_of=parts(REGEX, REGEX, REGEX)), "sampling.grammar"),
    (grammar(repetition=generation.Repetition(max=1)), "sampling.grammar.repetition.grammar"),
    (repetition(min=2, max=1), "sampling.grammar.repetition.max"),
    (repetition(max=0), "sampling.grammar.repetition.max"),
    (repetition(min=4), "sampling.grammar.repetition"),
    (grammar(text_until=""), "sampling.grammar.text_until"),
    (scoring(top_logprobs=21), "prompt_scoring.top_logprobs"),
    (scoring(num_alternatives=5), "prompt_scoring.num_alternatives"),
    (targets(0, 1), "prompt_scoring.target_offsets"),
    (targets(0, 1, 2, 2), "prompt_scoring.target_offsets"),
    (targets(), "prompt_scoring.target_offsets"),
    (targets(1, 1, 2), "prompt_scoring.target_offsets"),
    (targets(0, 1, 1), "prompt_scoring.target_offsets"),
    (targets(0, 3, 2), "prompt_scoring.target_offsets"),
    (targets(0, 1, 2, tokens=(1, 1_000)), "prompt_scoring.target_token_ids"),
]


@pytest.mark.parametrize(("overrides", "field"), BAD)
def test_a_bad_field_is_named(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(HeadwayError) as caught:
        check(**overrides)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.field == field


def test_a_schema_may_be_nested_only_so_deep() -> None:
    deep = "[" * 60_000
    with pytest.raises(HeadwayError) as caught:
        check(SchedulerSettings(), **grammar(json_schema=deep))
    assert caught.value.field == "sampling.grammar.json_schema"


def test_grammars_may_be_nested_only_so_deep() -> None:
    def check_depth(depth: int) -> None:
        one = REGEX
        for _ in range(depth - 1):
            one = generation.Grammar(any_of=parts(one))
        check(SchedulerSettings(), **grammar(any_of=parts(one)))

    check_depth(15)
    with pytest.raises(HeadwayError) as caught:
        check_depth(16)
    assert caught.value.field == "sampling.grammar"


@pytest.mark.parametrize(
    "overrides",
    [
        sampling(logprobs=True, top_logprobs=20),
        sampling(presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=1.5),
        bias((0, -100.0), (999, 100.0)),
        grammar(json_schema="{}"),
        grammar(json_schema="true"),
        grammar(json_object=True),
        grammar(regex="a" * 20),
        choice("a", "b", "c"),
        grammar(sequence=parts(REGEX, REGEX)),
        grammar(any_of=parts(REGEX)),
        repetition(max=3),
        repetition(min=1),
        grammar(text_until="."),
        scoring(logprobs=True, last_n=99),
        scoring(top_logprobs=20, num_alternatives=4),
        targets(0, 0, 2),
    ],
)
def test_what_is_within_its_limits_passes(overrides: dict[str, Any]) -> None:
    _, own = check(**overrides)
    for name in ("grammar", "logit_bias", "top_logprobs", "presence_penalty"):
        assert getattr(own.sampling, name) == getattr(body(**overrides).sampling, name)
    assert own.HasField("prompt_scoring") == ("prompt_scoring" in overrides)


@pytest.mark.parametrize("asked", [scoring(), scoring(last_n=2)])
def test_scoring_that_asks_nothing_is_left_out(asked: dict[str, Any]) -> None:
    _, own = check(**asked)
    assert not own.HasField("prompt_scoring")


def test_a_prompt_of_one_token_has_no_more_than_a_blank() -> None:
    one: Any = {"prompt_token_ids": [1]}
    _, own = check(**one, **scoring(logprobs=True))
    assert own.HasField("prompt_scoring")
    for asked in (targets(0, tokens=()), scoring(top_logprobs=3, num_alternatives=2)):
        _, own = check(**one, **asked)
        assert not own.HasField("prompt_scoring"), "there would be nothing to say"


def test_the_vocabulary_bounds_the_alternatives() -> None:
    small = generation.ModelCard(name="tiny", vocab_size=5, max_context_tokens=100)
    asked = body(sampling={"logprobs": True, "top_logprobs": 6})
    with pytest.raises(HeadwayError, match="above 5"):
        translate.request_from_proto(asked, small, SETTINGS)


def test_a_quota_is_neither_stored_nor_compared() -> None:
    limits = generation.Quota(key_id="k", requests_per_s=2)
    first, own = check(quota=limits, idempotency_key="i")
    assert not own.HasField("quota")
    second, _ = check(quota=generation.Quota(key_id="other"), idempotency_key="i")
    assert first.body_hash == second.body_hash
    other, _ = check(quota=limits, idempotency_key="i", group="g")
    assert other.body_hash != first.body_hash


def num_bytes(**overrides: Any) -> int:
    request, own = check(**overrides)
    return request.num_bytes - own.ByteSize()


def test_what_is_asked_for_is_counted_at_the_door() -> None:
    plain = num_bytes(**sampling(logprobs=True))
    top = num_bytes(num_samples=2, **sampling(logprobs=True, top_logprobs=5))
    assert top == plain + 4 * 8 + 2 * 4 * 5 * 8
    assert num_bytes(**scoring(logprobs=True)) == num_bytes() + 3 * 8
    assert num_bytes(**scoring(top_logprobs=3, last_n=1)) == num_bytes() + 3 * 8
    assert num_bytes(**scoring(num_alternatives=4)) == num_bytes() + 2 * 4 * 8
    assert num_bytes(**targets(0, 1, 2)) == num_bytes() + 2 * 8


def test_more_than_can_travel_is_refused() -> None:
    settings = SchedulerSettings(
        max_message_bytes=1 << 20, max_frame_tokens=1, max_orders_bytes=1024
    )
    card = generation.ModelCard(name="tiny", vocab_size=5_000, max_context_tokens=10_000)
    asked = body(prompt_token_ids=[1] * 8_000, **scoring(logprobs=True, top_logprobs=2))
    translate.request_from_proto(asked, card, settings)
    asked.prompt_scoring.top_logprobs = 20
    with pytest.raises(HeadwayError, match="too much to travel"):
        translate.request_from_proto(asked, card, settings)
