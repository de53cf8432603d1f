"""Alternatives of tokens and scores of prompts in the relay: frames in, updates out."""

import math
from typing import Any

import pytest

from headway.errors import HeadwayError
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.outputs import Output
from scheduler_svc.relay import Routes
from scheduler_svc.routes import Lease
from scheduler_svc.subscriptions import Feed
from tests.scheduler.test_relay import end, frame

NAN = math.nan
SCORING = generation.PromptScoring(
    logprobs=True,
    top_logprobs=2,
    target_offsets=[0, 1, 1],
    target_token_ids=[9],
    num_alternatives=1,
)


def output(request_id: str = "r", **fields: Any) -> Output:
    values: dict[str, Any] = {
        "num_samples": 1,
        "max_tokens": 10,
        "vocab_size": 1_000,
        "has_logprobs": True,
        "num_prompt_tokens": 3,
    }
    return Output(request_id, **(values | fields))


def rich(lease: Lease, index: int, token: int, num_top: int = 2) -> generation.StepFrame:
    """A token with alternatives: n is the id n after it, at -n."""
    made = frame((lease.handle, index, token), logprob=[-0.5])
    made.num_top.append(num_top)
    made.top_token_id.extend(range(token, token + num_top))
    made.top_logprob.extend(-float(n) for n in range(num_top))
    return made


def scores(lease: Lease, **changes: Any) -> generation.PromptScores:
    """The answer to SCORING for a prompt of three tokens."""
    fields: dict[str, Any] = {
        "handle": lease.handle,
        "logprob": [NAN, -1, -2],
        "top_token_id": [1, 2, 3, 4],
        "top_logprob": [-1, -2, -1, -2],
        "target_logprob": [-3],
        "alternative_token_id": [5, 6],
        "alternative_logprob": [-4, -5],
    }
    return generation.PromptScores(**(fields | changes))


def with_scores(lease: Lease, **changes: Any) -> generation.StepFrame:
    return generation.StepFrame(prompt_scores=[scores(lease, **changes)])


def take(feed: Feed, max_tokens: int = 1_000) -> scheduler.Updates:
    updates = scheduler.Updates()
    feed.take(updates, max_tokens)
    return updates


def alternatives(got: generation.StepFrame) -> list[tuple[int, int, list[int]]]:
    """(handle, index, ids of the alternatives) of each entry."""
    assert len(got.top_token_id) == len(got.top_logprob) == sum(got.num_top)
    stop, found = 0, []
    for handle, index, num in zip(got.handle, got.index, got.num_top, strict=True):
        start, stop = stop, stop + num
        found.append((handle, index, list(got.top_token_id[start:stop])))
    return found


# --- alternatives ---------------------------------------------------------------------------


def test_alternatives_reach_every_reader_and_the_result() -> None:
    routes, own, feed = Routes(1), output(num_top=2), Feed(lambda: None)
    plain = output("p", has_logprobs=False)
    lease, other = routes.open(own, 1), routes.open(plain, 1)
    feed.subscribe(plain, 20, ())
    feed.subscribe(own, 10, ())
    both = frame((other.handle, 0, 5), logprob=[NAN])
    both.num_top.append(0)
    both.MergeFrom(rich(lease, 0, 7))
    both.MergeFrom(rich(lease, 1, 8))
    routes.accept_frame(both)
    got = take(feed).frame
    assert alternatives(got) == [(20, 0, []), (10, 0, [7, 8]), (10, 1, [8, 9])]
    feed.subscribe(own, 30, [1])
    assert alternatives(take(feed).frame) == [(30, 1, [8, 9])]
    (sample,) = own.samples()
    assert list(sample.top_token_ids) == [7, 8, 8, 9]
    assert list(sample.top_logprobs) == [0, -1, 0, -1]
    assert not plain.samples()[0].top_token_ids


def test_a_frame_counts_alternatives_and_always_goes_on() -> None:
    routes, own, feed = Routes(1), output(num_top=2), Feed(lambda: None)
    lease = routes.open(own, 1)
    feed.subscribe(own, 0, ())
    for index in range(5):
        routes.accept_frame(rich(lease, index, index))
    sizes = []
    while feed.has_news:
        sizes.append(len(take(feed, 4).frame.handle))
    assert sizes == [2, 2, 1]


def test_a_finished_request_replays_its_alternatives_and_scores() -> None:
    routes, own = Routes(1), output(num_top=2, scoring=SCORING)
    lease = routes.open(own, 1)
    routes.accept_frame(with_scores(lease))
    routes.accept_frame(rich(lease, 0, 7))
    routes.accept_frame(end(lease, 1))
    result = generation.GenerationResult(samples=own.samples(), prompt_scores=own.prompt_scores)
    feed = Feed(lambda: None)
    feed.subscribe(Output.replay("r", result), 4, ())
    got = take(feed).frame
    assert alternatives(got) == [(4, 0, [7, 8])]
    assert [s.handle for s in got.prompt_scores] == [4]


@pytest.mark.parametrize("num_top", [0, 1, 3])
def test_as_many_alternatives_as_were_asked_for(num_top: int) -> None:
    routes, own = Routes(1), output(num_top=2)
    lease = routes.open(own, 1)
    with pytest.raises(HeadwayError, match="alternatives"):
        routes.accept_frame(rich(lease, 0, 7, num_top))
    with pytest.raises(HeadwayError, match="alternatives"):
        routes.accept_frame(frame((lease.handle, 0, 7), logprob=[-0.5]))
    assert own.num_tokens == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_top": [2, 0]}, "num_top is not parallel"),
        ({"num_top": [3]}, "as num_top says"),
        ({"top_logprob": [-1.0]}, "as num_top says"),
        ({"top_logprob": [-1.0, NAN]}, "not finite"),
        ({"top_logprob": [-math.inf, -1.0]}, "not finite"),
        ({"top_token_id": [0, 1_000]}, "vocabulary"),
        ({"logprob": []}, "logprob is missing"),
        ({"token_id": [1_000]}, "vocabulary"),
        ({"index": [1]}, "was due"),
        ({"handle": [99]}, "never granted"),
    ],
)
def test_bad_alternatives_end_the_stream(change: dict[str, list[float]], match: str) -> None:
    routes, own = Routes(1), output(num_top=2)
    bad = rich(routes.open(own, 1), 0, 7)
    for name, values in change.items():
        bad.ClearField(name)  # type: ignore[arg-type]
        getattr(bad, name).extend(values)
    with pytest.raises(HeadwayError, match=match):
        routes.accept_frame(bad)
    assert own.num_tokens == 0
    assert not own.top_token_ids[0]


def test_alternatives_of_dropped_and_repeated_tokens_are_skipped() -> None:
    routes, own, gone = Routes(1), output(num_top=2), output("g", num_top=1)
    lease, closed = routes.open(own, 1), routes.open(gone, 1)
    routes.close(closed)
    routes.accept_frame(rich(lease, 0, 7))
    both = rich(closed, 0, 50, num_top=1)
    both.MergeFrom(rich(lease, 0, 7))
    both.MergeFrom(rich(lease, 1, 8))
    routes.accept_frame(both)
    assert routes.num_dropped == 1
    assert list(own.top_token_ids[0]) == [7, 8, 8, 9]


# --- scores ---------------------------------------------------------------------------------


def test_scores_come_before_tokens_and_are_kept() -> None:
    routes, own, feed = Routes(1), output(scoring=SCORING), Feed(lambda: None)
    lease = routes.open(own, 1)
    feed.subscribe(own, 5, ())
    take(feed)
    news = routes.accept_frame(with_scores(lease))
    assert not news.started, "it is no token"
    (got,) = take(feed).frame.prompt_scores
    assert got.handle == 5
    assert list(got.top_token_id) == [1, 2, 3, 4]
    routes.accept_frame(frame((lease.handle, 0, 7), logprob=[-1.0]))
    assert not take(feed).frame.prompt_scores
    feed.subscribe(own, 8, [1])
    again = take(feed).frame
    assert [s.handle for s in again.prompt_scores] == [8], "whoever resumes may lack them"
    assert own.prompt_scores is not None
    assert own.prompt_scores.handle == 0


def test_a_token_before_the_scores_ends_the_stream() -> None:
    routes, own = Routes(1), output(num_samples=2, scoring=SCORING)
    lease = routes.open(own, 1)
    for sample in (0, 1):
        with pytest.raises(HeadwayError, match="before the prompt's scores"):
            routes.accept_frame(frame((lease.handle + sample, 0, 7), logprob=[-1.0]))
    routes.accept_frame(with_scores(lease))
    for sample in (0, 1):
        routes.accept_frame(frame((lease.handle + sample, 0, 7), logprob=[-1.0]))
    assert own.num_tokens == 2


def test_scores_and_first_token_may_share_a_frame() -> None:
    routes, own = Routes(1), output(scoring=SCORING)
    lease = routes.open(own, 1)
    both = with_scores(lease)
    both.MergeFrom(frame((lease.handle, 0, 7), logprob=[-1.0]))
    assert routes.accept_frame(both).started == [lease]


def test_a_completed_lease_without_scores_is_incomplete() -> None:
    routes, own = Routes(1), output(scoring=SCORING, num_samples=1)
    lease = routes.open(own, 1)
    routes.accept_frame(end(lease, 0))
    assert "scores" in (routes.incomplete(lease, [0]) or "")
    routes.accept_frame(with_scores(lease))
    assert routes.incomplete(lease, [0]) is None


def test_scores_that_came_already_are_kept_as_they_are() -> None:
    routes, own = Routes(1), output(scoring=SCORING)
    routes.accept_frame(with_scores(routes.open(own, 1)))
    routes.accept_frame(with_scores(routes.open(own, 2), target_logprob=[-9]))
    assert own.prompt_scores is not None
    assert list(own.prompt_scores.target_logprob) == [-3]


def test_many_scores_go_out_one_message_after_the_other() -> None:
    routes, feed = Routes(1), Feed(lambda: None)
    outputs = [output(str(number), scoring=SCORING) for number in range(3)]
    for number, own in enumerate(outputs):
        feed.subscribe(own, 10 * number, ())
    take(feed)
    for own in outputs:
        lease = routes.open(own, 1)
        routes.accept_frame(with_scores(lease))
        routes.accept_frame(frame((lease.handle, 0, 7), logprob=[-1.0]))
    seen: list[tuple[list[int], list[int]]] = []
    while feed.has_news:
        got = take(feed, 10).frame
        seen.append(([s.handle for s in got.prompt_scores], list(got.handle)))
    assert [handle for handles, _ in seen for handle in handles] == [0, 10, 20]
    assert all(len(handles) <= 1 for handles, _ in seen)
    scored: set[int] = set()
    for handles, tokens in seen:
        scored.update(handles)
        assert scored.issuperset(tokens)
    assert sorted(token for _, tokens in seen for token in tokens) == [0, 10, 20]


@pytest.mark.parametrize(
    "changes",
    [
        {"logprob": []},
        {"logprob": [NAN, -1]},
        {"logprob": [-1, -1, -1]},
        {"logprob": [NAN, NAN, -1]},
        {"logprob": [NAN, -math.inf, math.inf]},
        {"top_token_id": [1, 2, 3]},
        {"top_token_id": [1, 2, 3, 1_000]},
        {"top_logprob": [-1, -1, -1, NAN]},
        {"top_logprob": [-1, -1, -1]},
        {"target_logprob": []},
        {"target_logprob": [NAN]},
        {"alternative_token_id": [1, 1_000]},
        {"alternative_token_id": [1]},
        {"alternative_logprob": [-1, math.inf]},
        {"handle": 2},
    ],
)
def test_scores_that_do_not_fit_the_question_end_the_stream(changes: dict[str, Any]) -> None:
    routes, own = Routes(1), output(scoring=SCORING, num_samples=2)
    lease = routes.open(own, 1)
    with pytest.raises(HeadwayError, match="scores"):
        routes.accept_frame(with_scores(lease, **changes))
    assert own.lacks_scores


def test_scores_that_nobody_asked_for_end_the_stream_and_late_ones_are_dropped() -> None:
    routes, own = Routes(1), output()
    lease = routes.open(own, 1)
    with pytest.raises(HeadwayError, match="nobody asked"):
        routes.accept_frame(with_scores(lease))
    routes.close(lease)
    routes.accept_frame(with_scores(lease))
    assert routes.num_dropped == 1


@pytest.mark.parametrize(
    ("last_n", "logprob", "num_rows"),
    [(0, [NAN, -1, -1], 2), (1, [NAN, NAN, -1], 1), (2, [NAN, -1, -1], 2), (9, [NAN, -1, -1], 2)],
)
def test_only_the_last_tokens_are_scored(last_n: int, logprob: list[float], num_rows: int) -> None:
    scoring = generation.PromptScoring(logprobs=True, top_logprobs=1, last_n=last_n)
    routes, own = Routes(1), output(scoring=scoring)
    lease = routes.open(own, 1)
    answer = generation.PromptScores(
        handle=lease.handle,
        logprob=logprob,
        top_token_id=[1] * num_rows,
        top_logprob=[-1] * num_rows,
    )
    routes.accept_frame(generation.StepFrame(prompt_scores=[answer]))
    assert not own.lacks_scores
