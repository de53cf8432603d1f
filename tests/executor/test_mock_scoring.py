"""Alternatives and scores of the mock engine, and in its worker."""

import math
import threading
from typing import Any

import pytest

from executor_svc.core.engine import (
    Grammar,
    GrammarKind,
    InvalidLeaseError,
    PromptScoring,
    SamplingParams,
    StepOutput,
)
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.mock_formulas import mock_logprob, mock_scores, mock_tokens, mock_top
from executor_svc.worker import Worker
from tests.executor.scored import lease, scores


def mock(**config: Any) -> MockEngine:
    return MockEngine(MockConfig(**({"step_ms": 0.0, "vocab_size": 100} | config)))


def run(engine: MockEngine) -> StepOutput:
    """Everything it makes, merged; alternatives must stay parallel."""
    whole = StepOutput()
    while engine.has_work():
        output = engine.step()
        assert len(output.num_top) in (0, len(output.key))
        whole.num_top += output.num_top or [0] * len(output.key)
        for name in ("key", "token_id", "top_token_id", "top_logprob", "prompt_scores"):
            getattr(whole, name).extend(getattr(output, name))
        whole.num_cached |= output.num_cached
    return whole


@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_mock_alternatives_are_the_formulas(tokens_per_step: int) -> None:
    engine = mock(tokens_per_step=tokens_per_step)
    engine.add(lease(0, params=SamplingParams(max_tokens=9)))
    engine.add(lease(1, params=SamplingParams(max_tokens=3, top_logprobs=2)))
    output, stop = run(engine), 0
    assert sum(output.num_top) == 6
    for key, token_id, num in zip(output.key, output.token_id, output.num_top, strict=True):
        assert num == (2 if key == 1 else 0)
        ids, logprobs = mock_top(token_id, num, 100)
        assert output.top_token_id[stop : stop + num] == ids
        assert output.top_logprob[stop : stop + num] == logprobs
        assert ids[:1] == [token_id][:num]
        assert logprobs == sorted(logprobs, reverse=True)
        stop += num


def test_mock_scores_come_first_and_are_the_formulas() -> None:
    engine = mock()
    scoring = PromptScoring(True, 2, 2, [0, 1, 1], [50], 3)
    engine.add(lease(4, (10, 20, 30), scoring=scoring))
    output = engine.step()
    assert output.key == [4]
    (found,) = output.prompt_scores
    assert found.key == 4
    assert math.isnan(found.logprob[0])
    assert found.logprob[1:] == [mock_logprob(20), mock_logprob(30)]
    assert found.top_token_id == [20, 21, 30, 31]
    assert found.target_logprob == [mock_logprob(50)]
    assert found.alternative_token_id == mock_tokens(
        (10, 20, 30), seed=7, sample=2**32 - 1, start=0, stop=6, vocab_size=100
    )
    assert len(found.alternative_logprob) == 6


def test_mock_scores_of_the_last_tokens_only() -> None:
    scoring = PromptScoring(wants_logprobs=True, top_logprobs=1, last_n=1)
    found = mock_scores(lease(0, (10, 20, 30)), scoring, 100)
    assert [math.isnan(logprob) for logprob in found.logprob] == [True, True, False]
    assert found.top_token_id == [30]


def test_mock_remembers_the_last_prompt_of_a_salt() -> None:
    engine = mock()
    for key, prompt, salt in (
        (0, (1, 2, 3), "a"),
        (1, (1, 2, 3), "a"),
        (2, (1, 2, 9, 9), "a"),
        (3, (1, 2, 9, 9, 5), "b"),
        (4, (1, 2, 9, 9, 5), "a"),
    ):
        engine.add(lease(key, prompt, cache_salt=salt))
    assert run(engine).num_cached == {0: 0, 1: 2, 2: 2, 3: 0, 4: 4}


def test_mock_says_nothing_of_a_lease_that_was_aborted_at_once() -> None:
    engine = mock()
    engine.add(lease(0, scoring=PromptScoring(wants_logprobs=True)))
    done = SamplingParams(max_tokens=1)
    engine.add(lease(1, params=done, generated=((5,),)))
    engine.abort(0)
    engine.abort(1)
    assert not engine.has_work()
    output = engine.step()
    assert (output.prompt_scores, output.num_cached, output.ends) == ([], {}, [])


def test_mock_refuses_a_grammar() -> None:
    grammar = Grammar(GrammarKind.CHOICE, ("a",))
    with pytest.raises(InvalidLeaseError, match="grammar"):
        mock().add(lease(0, params=SamplingParams(max_tokens=1, grammar=grammar)))


class Steps:
    """An engine that makes what it was given, a step each."""

    def __init__(self, *outputs: StepOutput) -> None:
        self._outputs = list(outputs)
        self.is_done = threading.Event()

    def has_work(self) -> bool:
        return bool(self._outputs)

    def step(self) -> StepOutput:
        output = self._outputs.pop(0)
        if not self._outputs:
            self.is_done.set()
        return output

    def close(self) -> None:
        pass


def worked(*outputs: StepOutput) -> StepOutput:
    """What a worker gives after these steps."""
    engine: Any = Steps(*outputs)
    worker = Worker(lambda: engine, max_backlog_tokens=100)
    worker.start(lambda: None)
    assert engine.is_done.wait(10)
    assert worker.close(10)
    return worker.take().output


def tokens(*keys: int, **more: Any) -> StepOutput:
    num = len(keys)
    return StepOutput(key=[*keys], index=[0] * num, token_id=[1] * num, logprob=[0.0] * num, **more)


def test_steps_merge_with_and_without_alternatives() -> None:
    rich = {"num_top": [0, 2], "top_token_id": [8, 9], "top_logprob": [-1.0, -2.0]}
    outputs = (
        tokens(1),
        tokens(1, 2, **rich),
        tokens(3),
        StepOutput(prompt_scores=[scores(5)], num_cached={5: 3}),
    )
    output = worked(*outputs)
    assert output.key == [1, 1, 2, 3]
    assert output.num_top == [0, 0, 2, 0]
    assert (output.top_token_id, output.top_logprob) == ([8, 9], [-1.0, -2.0])
    assert (len(output.prompt_scores), output.num_cached) == (1, {5: 3})


def test_a_step_of_scores_alone_is_told() -> None:
    for output in (StepOutput(prompt_scores=[scores(5)]), StepOutput(num_cached={5: 3})):
        assert worked(output) == output
