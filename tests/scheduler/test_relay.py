"""The token path without gRPC: frames in, updates out."""

import math
import random

import pytest

from headway.errors import HeadwayError
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.outputs import Output
from scheduler_svc.relay import Routes
from scheduler_svc.routes import Lease
from scheduler_svc.subscriptions import Feed
from tests.scheduler.world import LENGTH


def make_output(
    request_id: str = "r",
    *,
    num_samples: int = 1,
    max_tokens: int = 100,
    has_logprobs: bool = False,
) -> Output:
    return Output(
        request_id,
        num_samples=num_samples,
        max_tokens=max_tokens,
        vocab_size=1_000,
        has_logprobs=has_logprobs,
    )


def frame(
    *entries: tuple[int, int, int], logprob: list[float] | None = None
) -> generation.StepFrame:
    """Entries are (handle, index, token)."""
    handles, indexes, tokens = zip(*entries, strict=True)
    return generation.StepFrame(
        handle=handles, index=indexes, token_id=tokens, logprob=logprob or []
    )


def end(lease: Lease, num_tokens: int, sample: int = 0) -> generation.StepFrame:
    ended = generation.SequenceEnd(
        handle=lease.handle + sample, num_tokens=num_tokens, reason=LENGTH
    )
    return generation.StepFrame(ends=[ended])


class Reader:
    """A feed, and what came out of it."""

    def __init__(self) -> None:
        self.num_wakes = 0
        self.feed = Feed(self._wake)
        self.tokens: dict[int, dict[int, int]] = {}

    def _wake(self) -> None:
        self.num_wakes += 1

    def take(self, max_tokens: int = 1_000) -> scheduler.Updates:
        updates = scheduler.Updates()
        self.feed.take(updates, max_tokens)
        got = updates.frame
        for handle, index, token in zip(got.handle, got.index, got.token_id, strict=True):
            assert index not in self.tokens.setdefault(handle, {}), "each index comes once"
            self.tokens[handle][index] = token
        return updates


def test_tokens_arrive_in_order_and_the_first_one_is_reported() -> None:
    routes, reader, output = Routes(1), Reader(), make_output()
    lease = routes.open(output, 1)
    reader.feed.subscribe(output, 5, ())
    assert not reader.take().HasField("frame")
    assert routes.accept_frame(frame((lease.handle, 0, 10))).started == [lease]
    assert routes.accept_frame(frame((lease.handle, 1, 11), (lease.handle, 2, 12))).started == []
    updates = reader.take()
    assert list(updates.frame.handle) == [5, 5, 5]
    assert list(updates.frame.index) == [0, 1, 2]
    assert list(updates.frame.token_id) == [10, 11, 12]
    assert not reader.feed.has_news


def test_overlap_is_compared() -> None:
    routes, output = Routes(1), make_output()
    lease = routes.open(output, 1)
    routes.accept_frame(frame((lease.handle, 0, 10), (lease.handle, 1, 11)))
    news = routes.accept_frame(frame((lease.handle, 0, 10), (lease.handle, 1, 11)))
    assert not news.faults
    news = routes.accept_frame(frame((lease.handle, 1, 12), (lease.handle, 2, 13)))
    assert list(news.faults) == [lease]
    assert list(output.token_ids[0]) == [10, 11]
    assert routes.num_dropped == 1, "the rest of a faulted lease is dropped"


@pytest.mark.parametrize("index", [1, 2, (1 << 32) - 1])
def test_a_gap_raises(index: int) -> None:
    routes, output = Routes(1), make_output()
    lease = routes.open(output, 1)
    with pytest.raises(HeadwayError, match="was due"):
        routes.accept_frame(frame((lease.handle, index, 1)))


def test_what_came_before_a_violation_is_kept_and_announced() -> None:
    routes, reader, output = Routes(1), Reader(), make_output()
    lease = routes.open(output, 1)
    reader.feed.subscribe(output, 0, ())
    reader.take()
    with pytest.raises(HeadwayError):
        routes.accept_frame(frame((lease.handle, 0, 1), (lease.handle, 5, 1)))
    reader.take()
    assert reader.tokens == {0: {0: 1}}


def test_tokens_are_bounded_and_none_come_after_the_end() -> None:
    routes, output = Routes(1), make_output(max_tokens=2)
    lease = routes.open(output, 1)
    with pytest.raises(HeadwayError, match="past the end"):
        routes.accept_frame(frame(*((lease.handle, n, 1) for n in range(3))))
    routes, output = Routes(1), make_output()
    lease = routes.open(output, 1)
    routes.accept_frame(frame((lease.handle, 0, 1)))
    routes.accept_frame(end(lease, 1))
    with pytest.raises(HeadwayError, match="past the end"):
        routes.accept_frame(frame((lease.handle, 1, 1)))


def test_handles_of_ended_leases_are_dropped_and_unknown_ones_raise() -> None:
    routes, output = Routes(1), make_output()
    lease = routes.open(output, 1)
    routes.close(lease)
    routes.accept_frame(frame((lease.handle, 0, 1)))
    assert routes.num_dropped == 1
    for handle in (0, lease.handle + 1):
        with pytest.raises(HeadwayError, match="never granted"):
            routes.accept_frame(frame((handle, 0, 1)))


def test_a_new_lease_cuts_off_the_old_one_and_goes_on() -> None:
    old, new, output = Routes(1), Routes(1), make_output()
    first = old.open(output, 1)
    old.accept_frame(frame((first.handle, 0, 1)))
    second = new.open(output, 2)
    old.accept_frame(frame((first.handle, 1, 9)))
    assert old.num_dropped == 1
    new.accept_frame(frame((second.handle, 1, 2)))
    assert list(output.token_ids[0]) == [1, 2]


def test_a_sealed_output_grows_no_more() -> None:
    routes, output = Routes(1), make_output()
    lease = routes.open(output, 1)
    output.seal()
    routes.accept_frame(frame((lease.handle, 0, 1)))
    assert output.num_tokens == 0


def test_finished_comes_with_or_after_the_last_token() -> None:
    routes, reader, output = Routes(1), Reader(), make_output()
    lease = routes.open(output, 1)
    subscription = reader.feed.subscribe(output, 3, ())
    routes.accept_frame(frame(*((lease.handle, n, n) for n in range(5))))
    routes.accept_frame(end(lease, 5))
    output.finish(generation.GenerationResult())
    first = reader.take(max_tokens=3)
    assert not first.finished
    assert not first.frame.ends
    second = reader.take(max_tokens=3)
    assert [end.handle for end in second.frame.ends] == [3]
    assert [finished.handle for finished in second.finished] == [3]
    assert not output.followers
    assert subscription.handle not in reader.feed.subscriptions
    assert reader.tokens == {3: {n: n for n in range(5)}}


def test_a_slow_reader_gets_one_message_and_costs_one_wake() -> None:
    routes, reader, output = Routes(1), Reader(), make_output()
    lease = routes.open(output, 1)
    reader.feed.subscribe(output, 0, ())
    reader.take()
    num_wakes = reader.num_wakes
    for index in range(50):
        routes.accept_frame(frame((lease.handle, index, index)))
    assert reader.num_wakes == num_wakes + 1
    assert len(reader.take().frame.token_id) == 50


def test_the_frame_limit_is_fair_and_loses_nothing() -> None:
    routes, reader = Routes(1), Reader()
    leases = []
    for number in range(4):
        output = make_output(str(number))
        leases.append(routes.open(output, 1))
        reader.feed.subscribe(output, number, ())
    for index in range(10):
        routes.accept_frame(frame(*((lease.handle, index, index) for lease in leases)))
    num_messages = 0
    while reader.feed.has_news:
        assert len(reader.take(max_tokens=7).frame.handle) <= 7
        num_messages += 1
    assert num_messages == 6
    assert reader.tokens == {handle: {n: n for n in range(10)} for handle in range(4)}


@pytest.mark.parametrize("start", range(5))
def test_resume_from_any_index(start: int) -> None:
    routes, reader, output = Routes(1), Reader(), make_output()
    lease = routes.open(output, 1)
    routes.accept_frame(frame((lease.handle, 0, 0), (lease.handle, 1, 1), (lease.handle, 2, 2)))
    reader.feed.subscribe(output, 0, [start])
    reader.take()
    routes.accept_frame(frame((lease.handle, 3, 3), (lease.handle, 4, 4)))
    reader.take()
    assert reader.tokens == {0: {n: n for n in range(start, 5)}}


def test_logprobs_are_parallel_and_nan_where_nobody_asked() -> None:
    routes, reader = Routes(1), Reader()
    plain, asked = make_output("a"), make_output("b", has_logprobs=True)
    first, second = routes.open(plain, 1), routes.open(asked, 1)
    reader.feed.subscribe(plain, 0, ())
    reader.feed.subscribe(asked, 1, ())
    reader.take()
    routes.accept_frame(
        frame((first.handle, 0, 1), (second.handle, 0, 2), logprob=[math.nan, -0.5])
    )
    routes.accept_frame(frame((first.handle, 1, 1)))
    logprobs = reader.take().frame.logprob
    assert [math.isnan(value) for value in logprobs] == [True, True, False]
    assert logprobs[2] == -0.5


def test_completeness_is_checked() -> None:
    routes, output = Routes(1), make_output(num_samples=2)
    lease = routes.open(output, 1)
    routes.accept_frame(frame((lease.handle, 0, 1), (lease.handle + 1, 0, 1)))
    routes.accept_frame(end(lease, 1))
    assert "no end" in (routes.incomplete(lease, [1, 1]) or "")
    routes.accept_frame(end(lease, 1, sample=1))
    assert routes.incomplete(lease, [1, 1]) is None
    assert routes.incomplete(lease, [1, 2]) is not None
    assert routes.incomplete(lease, [1]) is not None


def test_an_end_that_does_not_match_is_a_fault() -> None:
    routes, output = Routes(1), make_output()
    lease = routes.open(output, 1)
    assert list(routes.accept_frame(end(lease, 1)).faults) == [lease]


def test_heartbeats_find_lost_leases() -> None:
    routes = Routes(1)
    first, second = routes.open(make_output("a"), 1), routes.open(make_output("b"), 1)
    beat = fleet.ExecutorHeartbeat(handles=[], last_handle=first.handle)
    assert routes.lost(beat) == [first]
    beat.handles.append(first.handle)
    assert routes.lost(beat) == []
    beat.last_handle = second.handle
    assert routes.lost(beat) == [second]


def test_any_interleaving_delivers_every_token_once() -> None:
    rng = random.Random(7)
    routes = Routes(1)
    outputs = [make_output(str(n), num_samples=rng.randint(1, 3)) for n in range(8)]
    leases = [routes.open(output, 1) for output in outputs]
    readers = [Reader() for _ in range(3)]
    for reader in readers:
        base = 0
        for output in outputs:
            reader.feed.subscribe(output, base, ())
            base += output.num_samples
    handles = [
        lease.handle + sample for lease in leases for sample in range(lease.output.num_samples)
    ]
    lengths = dict.fromkeys(handles, 0)
    for _ in range(500):
        handle = rng.choice(handles)
        if lengths[handle] < 100:
            routes.accept_frame(frame((handle, lengths[handle], lengths[handle])))
            lengths[handle] += 1
        if rng.random() < 0.3:
            rng.choice(readers).take(max_tokens=rng.randint(1, 20))
    for reader in readers:
        while reader.feed.has_news:
            reader.take()
        expected = {
            number: {n: n for n in range(length)}
            for number, length in enumerate(lengths.values())
            if length
        }
        assert reader.tokens == expected
