"""Alternatives of tokens and scores of prompts, from the engine to the wire."""

import math
import threading
from typing import Any

import pytest

from executor_svc import translate, translate_orders
from executor_svc.core.engine import (
    Grammar,
    GrammarKind,
    InvalidLeaseError,
    LeaseRequest,
    PromptScores,
    PromptScoring,
    SamplingParams,
    StepOutput,
)
from executor_svc.core.messages import (
    Adopt,
    Disconnected,
    Effect,
    GeneratedSample,
    Grant,
    OrdersReceived,
    Outcome,
    Report,
    StartLease,
    StepDone,
    Welcomed,
)
from executor_svc.core.session import Session
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.mock_formulas import mock_logprob, mock_scores, mock_tokens, mock_top
from executor_svc.worker import Worker
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from tests.executor.test_session import attached, grant, length, ref, report

TOP2 = SamplingParams(max_tokens=8, top_logprobs=2)
SCORING = PromptScoring(wants_logprobs=True, top_logprobs=1)


def start(session: Session, *grants: Grant) -> list[LeaseRequest]:
    effects: list[Effect] = session.handle(OrdersReceived(grants=grants), 0)
    return [effect.request for effect in effects if isinstance(effect, StartLease)]


def step(session: Session, *entries: tuple[int, int, int], num_top: int = 2, **more: Any) -> None:
    """Entries are (key, index, token); alternative n of a token is the id n after it, at -n."""
    tops = [(token + n, -float(n)) for _, _, token in entries for n in range(num_top)]
    output = StepOutput(
        key=[key for key, _, _ in entries],
        index=[index for _, index, _ in entries],
        token_id=[token for _, _, token in entries],
        logprob=[-1.0] * len(entries),
        num_top=[num_top] * len(entries) if num_top else [],
        top_token_id=[token for token, _ in tops],
        top_logprob=[logprob for _, logprob in tops],
        **more,
    )
    assert session.handle(StepDone(output), 0) == []


def alternatives(taken: Report) -> list[tuple[int, int, list[int]]]:
    """(handle, index, ids of the alternatives) of each entry."""
    frame, stop, found = taken.frame, 0, []
    assert len(frame.top_token_id) == len(frame.top_logprob) == sum(frame.num_top)
    for handle, index, num in zip(frame.handle, frame.index, frame.num_top, strict=True):
        start, stop = stop, stop + num
        found.append((handle, index, frame.top_token_id[start:stop]))
    return found


def scores(key: int, num: int = 2) -> PromptScores:
    return PromptScores(key, [math.nan] + [-0.5] * (num - 1), [7] * (num - 1), [-0.25] * (num - 1))


def test_alternatives_go_with_their_tokens_and_the_others_have_none() -> None:
    session = attached()
    plain, rich = start(session, grant(1), grant(2, ref("b"), params=TOP2, wants_logprobs=True))
    step(session, (plain.key, 0, 10), num_top=0)
    step(session, (rich.key, 0, 20), (rich.key, 1, 21))
    step(session, (plain.key, 1, 11), num_top=0)
    taken = report(session)
    assert alternatives(taken) == [(1, 0, []), (1, 1, []), (2, 0, [20, 21]), (2, 1, [21, 22])]
    assert taken.frame.top_logprob == [0.0, -1.0, 0.0, -1.0]
    step(session, (plain.key, 2, 12), num_top=0)
    assert not report(session).frame.num_top, "nobody in the frame asked"


def test_a_frame_counts_alternatives_and_still_goes_on() -> None:
    session = attached(max_report_tokens=4)
    (lease,) = start(session, grant(1, params=TOP2))
    step(session, *((lease.key, index, index) for index in range(5)))
    sizes = []
    while (taken := session.take_report()) is not None:
        sizes.append(len(taken.frame.handle))
    assert sizes == [2, 2, 1]


def test_after_an_adoption_alternatives_are_sent_again_from_the_same_index() -> None:
    session = attached()
    (lease,) = start(session, grant(1, params=TOP2))
    step(session, (lease.key, 0, 10), (lease.key, 1, 11), (lease.key, 2, 12))
    report(session)
    session.handle(Disconnected(), 0)
    session.handle(Welcomed(1000, (Adopt(ref(), ref(attempt=2), 5, (1,)),)), 0)
    assert alternatives(report(session)) == [(5, 1, [11, 12]), (5, 2, [12, 13])]


def test_a_lease_goes_on_after_the_alternatives_that_came_with_it() -> None:
    session = attached()
    before = GeneratedSample([4], [-1.0], None, [4, 5], [0.0, -1.0])
    (lease,) = start(session, grant(1, params=TOP2, generated=(before,)))
    step(session, (lease.key, 1, 10))
    assert alternatives(report(session)) == [(1, 1, [10, 11])]
    session.handle(Disconnected(), 0)
    session.handle(Welcomed(1000, (Adopt(ref(), ref(attempt=2), 5, (0,)),)), 0)
    assert alternatives(report(session)) == [(5, 0, [4, 5]), (5, 1, [10, 11])]


@pytest.mark.parametrize("num", [0, 1, 3])
def test_generated_tokens_without_their_alternatives_are_refused(num: int) -> None:
    session = attached()
    before = GeneratedSample([4], [-1.0], None, [1] * num, [-1.0] * num)
    assert start(session, grant(1, params=TOP2, generated=(before,))) == []
    (ended,) = report(session).ended
    assert ended.outcome is Outcome.FAILED
    assert ended.failure is not None
    assert "alternatives" in ended.failure.message


def test_scores_precede_the_tokens_of_their_work() -> None:
    session = attached()
    (lease,) = start(session, grant(3, scoring=SCORING, cache_salt="t"))
    assert (lease.scoring, lease.cache_salt) == (SCORING, "t")
    step(session, num_top=0, prompt_scores=[scores(lease.key)], num_cached={lease.key: 1})
    step(session, (lease.key, 0, 10), num_top=0, ends=[length(lease.key, 1)])
    taken = report(session)
    (sent,) = taken.frame.prompt_scores
    assert sent.key == 3
    assert sent.top_token_id == [7]
    assert taken.frame.handle == [3]
    assert [ended.num_cached_prompt_tokens for ended in taken.ended] == [1]


def test_scores_fill_a_frame_and_hold_tokens_and_end_back() -> None:
    session = attached(max_report_tokens=4)
    one, two = start(session, grant(1, scoring=SCORING), grant(2, ref("b"), scoring=SCORING))
    step(session, num_top=0, prompt_scores=[scores(one.key), scores(two.key)])
    step(session, (one.key, 0, 10), num_top=0, ends=[length(one.key, 1)])
    first, second = report(session), report(session)
    assert [s.key for s in first.frame.prompt_scores] == [1]
    assert not first.frame.handle
    assert not first.ended
    assert [s.key for s in second.frame.prompt_scores] == [2]
    assert second.frame.handle == [1]
    assert [ended.ref for ended in second.ended] == [ref()]


@pytest.mark.parametrize("has_them", [False, True])
def test_scores_are_sent_again_if_the_scheduler_lacks_them(has_them: bool) -> None:
    session = attached()
    (lease,) = start(session, grant(1, scoring=SCORING))
    step(session, num_top=0, prompt_scores=[scores(lease.key)])
    report(session)
    session.handle(Disconnected(), 0)
    adopt = Adopt(ref(), ref(attempt=2), 9, (0,), has_prompt_scores=has_them)
    session.handle(Welcomed(1000, (adopt,)), 0)
    again = session.take_report()
    if has_them:
        assert again is None
    else:
        assert again is not None
        assert [s.key for s in again.frame.prompt_scores] == [9]


def test_scores_that_the_scheduler_has_are_not_made_again() -> None:
    session = attached()
    (lease,) = start(session, grant(1, scoring=SCORING, has_prompt_scores=True))
    assert lease.scoring is None


def test_a_lease_cannot_go_on_where_nobody_has_its_scores() -> None:
    session = attached()
    start(session, grant(1, scoring=SCORING, has_prompt_scores=True))
    session.handle(Disconnected(), 0)
    session.handle(Welcomed(1000, (Adopt(ref(), ref(attempt=2), 9, (0,)),)), 0)
    assert [(e.ref, e.outcome) for e in report(session).ended] == [
        (ref(attempt=2), Outcome.UNKNOWN)
    ]


def test_scores_of_a_revoked_lease_are_dropped() -> None:
    session = attached()
    (lease,) = start(session, grant(1, scoring=SCORING))
    step(session, num_top=0, prompt_scores=[scores(lease.key)])
    session.handle(OrdersReceived(revokes=(ref(),)), 0)
    taken = report(session)
    assert not taken.frame.prompt_scores
    assert [ended.outcome for ended in taken.ended] == [Outcome.REVOKED]
    step(session, num_top=0, prompt_scores=[scores(lease.key)])  # the step was under way
    assert session.take_report() is None


# --- the wire -------------------------------------------------------------------------------


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


# --- the mock engine and its worker ---------------------------------------------------------


def mock(**config: Any) -> MockEngine:
    return MockEngine(MockConfig(**({"step_ms": 0.0, "vocab_size": 100} | config)))


def lease(key: int, prompt: tuple[int, ...] = (1, 2, 3), **fields: Any) -> LeaseRequest:
    params = fields.pop("params", SamplingParams(max_tokens=3, seed=7))
    return LeaseRequest(key, "mock", prompt, params, **fields)


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
