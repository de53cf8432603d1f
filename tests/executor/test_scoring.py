"""Alternatives and scores in the attach session: order, bounds, what is sent again."""

import pytest

from executor_svc.core.engine import PromptScoring, SamplingParams
from executor_svc.core.messages import (
    Adopt,
    Disconnected,
    GeneratedSample,
    OrdersReceived,
    Outcome,
    Report,
    Welcomed,
)
from tests.executor.scored import scores, start, step
from tests.executor.sessions import attached, grant, length, ref, report

TOP2 = SamplingParams(max_tokens=8, top_logprobs=2)
SCORING = PromptScoring(wants_logprobs=True, top_logprobs=1)


def alternatives(taken: Report) -> list[tuple[int, int, list[int]]]:
    """(handle, index, ids of the alternatives) of each entry."""
    frame, stop, found = taken.frame, 0, []
    assert len(frame.top_token_id) == len(frame.top_logprob) == sum(frame.num_top)
    for handle, index, num in zip(frame.handle, frame.index, frame.num_top, strict=True):
        start, stop = stop, stop + num
        found.append((handle, index, frame.top_token_id[start:stop]))
    return found


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
