"""Each way in which a lease can be wrong is told by the name of its field."""

from dataclasses import replace
from typing import Any

import pytest

from executor_svc.core.engine import (
    Grammar,
    GrammarKind,
    InvalidLeaseError,
    LeaseRequest,
    ModelInfo,
    PromptScoring,
    SamplingParams,
)
from executor_svc.core.lease_rules import check_lease
from headway.reasons import Reason

REGEX = Grammar(GrammarKind.REGEX, ("a",))
MODEL = ModelInfo(
    name="m",
    family="qwen3",
    vocab_size=100,
    max_context_tokens=64,
    eos_token_ids=(2,),
    weights_digest="",
    assets_digest="",
    dtype="float32",
)
PROMPT = (5, 6, 7, 8)
LEASE = LeaseRequest(
    key=0, model="m", prompt_token_ids=PROMPT, params=SamplingParams(max_tokens=10)
)
NAN, INF = float("nan"), float("inf")


def _check(params: dict[str, Any] | None = None, **fields: Any) -> None:
    lease = replace(LEASE, params=replace(LEASE.params, **(params or {})), **fields)
    check_lease(lease, MODEL, can_match_text=True)


@pytest.mark.parametrize(
    "params",
    [
        {"top_logprobs": 1000},  # as many as there are
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 1e-9},
        {"logit_bias": ((0, -100.0), (99, 100.0))},
        {"grammar": Grammar(GrammarKind.JSON_OBJECT)},
        {"grammar": Grammar(GrammarKind.REGEX, ("a",))},
        {"grammar": Grammar(GrammarKind.CHOICE, ("a", "b"))},
        {"grammar": Grammar(GrammarKind.SEQUENCE, parts=(REGEX, REGEX))},
        {"grammar": Grammar(GrammarKind.REPETITION, parts=(REGEX,), times=(0, None))},
    ],
    ids=str,
)
def test_what_is_allowed(params: dict[str, Any]) -> None:
    _check(params)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"presence_penalty": NAN}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": INF}, "repetition_penalty"),
        ({"repetition_penalty": NAN}, "repetition_penalty"),
        ({"logit_bias": ((100, 1.0),)}, "logit_bias.*vocabulary"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias.*vocabulary"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias.*twice"),
        ({"logit_bias": ((1, 100.5),)}, "logit_bias.*-100 to 100"),
        ({"logit_bias": ((1, NAN),)}, "logit_bias.*-100 to 100"),
        ({"grammar": Grammar(GrammarKind.JSON_OBJECT, ("{}",))}, "json_object"),
        ({"grammar": Grammar(GrammarKind.REGEX)}, "regex needs one"),
        ({"grammar": Grammar(GrammarKind.JSON_SCHEMA, ("{}", "{}"))}, "json_schema needs one"),
        ({"grammar": Grammar(GrammarKind.CHOICE)}, "choice has no"),
        ({"grammar": Grammar(GrammarKind.CHOICE, ("a", "a"))}, "choice.*twice"),
        ({"grammar": Grammar(GrammarKind.ANY_OF)}, "any_of has no parts"),
        ({"grammar": Grammar(GrammarKind.SEQUENCE, parts=(Grammar(GrammarKind.REGEX),))}, "regex"),
        ({"grammar": Grammar(GrammarKind.REPETITION)}, "repetition has one part"),
        ({"grammar": Grammar(GrammarKind.REPETITION, (), (REGEX,), (2, 1))}, "no room"),
        ({"grammar": Grammar(GrammarKind.TEXT_UNTIL, ("",))}, "text_until is empty"),
    ],
    ids=str,
)
def test_wrong_parameters(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidLeaseError, match=said) as caught:
        _check(params)
    assert caught.value.reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize(
    "scoring",
    [
        PromptScoring(wants_logprobs=True, top_logprobs=100, last_n=1000),
        PromptScoring(target_offsets=(0, 1, 1, 3), target_token_ids=(0, 99, 1)),
        PromptScoring(target_offsets=(0, 0, 0, 0)),
    ],
    ids=str,
)
def test_scoring_that_is_allowed(scoring: PromptScoring) -> None:
    _check(scoring=scoring)


@pytest.mark.parametrize(
    ("scoring", "said"),
    [
        (PromptScoring(top_logprobs=101), "top_logprobs"),
        (PromptScoring(top_logprobs=-1), "top_logprobs"),
        (PromptScoring(last_n=-1), "last_n"),
        (PromptScoring(num_alternatives=-1), "num_alternatives"),
        (PromptScoring(target_token_ids=(1,)), "without target_offsets"),
        (PromptScoring(target_offsets=(0, 1), target_token_ids=(1,)), "each token of the prompt"),
        (PromptScoring(target_offsets=(1, 1, 1, 1), target_token_ids=(1,)), "run from 0"),
        (PromptScoring(target_offsets=(0, 1, 1, 2), target_token_ids=(1,)), "run from 0"),
        (PromptScoring(target_offsets=(0, 2, 1, 2), target_token_ids=(1, 2)), "not fall"),
        (PromptScoring(target_offsets=(0, 1, 1, 1), target_token_ids=(100,)), "vocabulary"),
    ],
    ids=str,
)
def test_wrong_scoring(scoring: PromptScoring, said: str) -> None:
    with pytest.raises(InvalidLeaseError, match=f"prompt_scoring.*{said}"):
        _check(scoring=scoring)


def test_grammars_need_a_tokenizer() -> None:
    params = replace(LEASE.params, grammar=Grammar(GrammarKind.JSON_OBJECT))
    with pytest.raises(InvalidLeaseError, match="grammars need a tokenizer, m has none"):
        check_lease(replace(LEASE, params=params), MODEL, can_match_text=False)
    check_lease(LEASE, MODEL, can_match_text=False)
