"""Alternatives and scores on the wire, both ways."""

from typing import Any

import pytest

from executor_svc import translate, translate_orders
from executor_svc.core.engine import Grammar, GrammarKind, PromptScoring, SamplingParams
from executor_svc.core.messages import GeneratedSample
from executor_svc.mock_engine import MockConfig, MockEngine
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from tests.executor.scored import scores, start, step
from tests.executor.sessions import attached, grant, length, report

TOP2 = SamplingParams(max_tokens=8, top_logprobs=2)
SCORING = PromptScoring(wants_logprobs=True, top_logprobs=1)


def test_what_a_grant_asks_for_reaches_the_engine() -> None:
    request = generation.GenerationRequest(
        model="m",
        prompt_token_ids=[1, 2],
        tenant="t",
        sampling=generation.SamplingParams(
            max_tokens=4,
            logprobs=True,
            top_logprobs=3,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.25,
            logit_bias=[generation.LogitBias(token_id=5, bias=-2.5)],
            grammar=generation.Grammar(choice=generation.Choice(texts=["a", "b"])),
        ),
        prompt_scoring=generation.PromptScoring(
            logprobs=True,
            top_logprobs=2,
            last_n=1,
            target_offsets=[0, 1],
            target_token_ids=[9],
            num_alternatives=4,
        ),
    )
    generated = generation.SampleResult(
        token_ids=[7], logprobs=[-1.0], top_token_ids=[7, 8, 9], top_logprobs=[-1, -2, -3]
    )
    message = fleet.Grant(request=request, generated=[generated], has_prompt_scores=True)
    (got,) = translate_orders.decode_orders(fleet.ExecutorOrders(grants=[message])).grants
    params = got.params
    assert (params.top_logprobs, params.presence_penalty, params.frequency_penalty) == (
        3,
        0.5,
        -0.5,
    )
    assert params.repetition_penalty == 1.25
    assert params.logit_bias == ((5, -2.5),)
    assert params.grammar == Grammar(GrammarKind.CHOICE, ("a", "b"))
    assert got.scoring == PromptScoring(True, 2, 1, [0, 1], [9], 4)
    assert (got.has_prompt_scores, got.cache_salt) == (True, "t")
    assert got.generated == (GeneratedSample([7], [-1.0], None, [7, 8, 9], [-1, -2, -3]),)


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ({}, None),
        ({"json_object": False}, None),
        ({"json_object": True}, Grammar(GrammarKind.JSON_OBJECT)),
        ({"json_schema": "{}"}, Grammar(GrammarKind.JSON_SCHEMA, ("{}",))),
        ({"regex": "a+"}, Grammar(GrammarKind.REGEX, ("a+",))),
    ],
)
def test_grammars_and_defaults(grammar: dict[str, Any], expected: Grammar | None) -> None:
    sampling = generation.SamplingParams(grammar=generation.Grammar(**grammar))
    message = fleet.Grant(request=generation.GenerationRequest(sampling=sampling))
    (got,) = translate_orders.decode_orders(fleet.ExecutorOrders(grants=[message])).grants
    assert got.params.grammar == expected
    assert got.params.repetition_penalty == 1.0
    assert got.scoring is None


def test_a_report_carries_alternatives_scores_and_cached_tokens() -> None:
    session = attached()
    (lease,) = start(session, grant(1, params=TOP2, scoring=SCORING))
    step(
        session,
        (lease.key, 0, 20),
        prompt_scores=[scores(lease.key, 3)],
        num_cached={lease.key: 2},
        ends=[length(lease.key, 1)],
    )
    message = translate.encode_report(report(session), max_models=1).report
    assert list(message.frame.num_top) == [2]
    assert list(message.frame.top_token_id) == [20, 21]
    assert list(message.frame.top_logprob) == [0.0, -1.0]
    (sent,) = message.frame.prompt_scores
    assert (sent.handle, list(sent.logprob)[1:], list(sent.top_token_id)) == (
        1,
        [-0.5] * 2,
        [7] * 2,
    )
    assert message.ended[0].num_cached_prompt_tokens == 2


def test_an_offer_carries_its_exactness_class() -> None:
    models = MockEngine(MockConfig()).models
    hello = translate.encode_hello(
        "e", "i", num_slots=1, max_models=1, models=models, held=()
    ).hello
    assert [offer.exactness_class for offer in hello.models] == ["mock"]
