"""The gateway's streams while a connection lasts: tokens, gaps, ends, bounds."""

import math

from gateway_http.core.frames import Alternatives, Frame
from gateway_http.core.handles import MAX_HANDLE
from gateway_http.core.messages import (
    Accepted,
    Cancel,
    Ended,
    Failure,
    Positioned,
    SampleEnded,
    Scored,
    Tokens,
)
from headway.reasons import Reason
from tests.gateway.streams_at_work import (
    MAX_RESUMES,
    PLENTY,
    accepted,
    connected,
    end,
    frame,
    opened,
)


def test_handles_increase_by_the_number_of_samples() -> None:
    streams = connected()
    first, second = opened(streams, num_samples=3), opened(streams)
    commands = streams.take(PLENTY)
    assert (first.handle, second.handle) == (1, 4)
    assert [submit.handle for submit in commands.submits] == [1, 4]
    assert not streams.take(PLENTY)


def test_tokens_of_samples_are_read_once_and_together() -> None:
    streams = connected()
    stream = accepted(streams, num_samples=2, wants_logprobs=True)
    handle = stream.handle
    streams.on_frame(
        Frame(
            [handle, handle + 1, handle],
            [0, 0, 1],
            [5, 6, 7],
            [-1.0, -2.0, -3.0],
            [(handle, 2, "e")],
        )
    )
    assert stream.read() == [
        Tokens(0, 0, [5, 7], [-1.0, -3.0]),
        SampleEnded(0, "e"),
        Tokens(1, 0, [6], [-2.0]),
    ]
    assert stream.read() == []
    assert not any(sample.logprobs for sample in stream.samples), "what was read is not kept"
    end(streams, handle + 1, 1)
    streams.on_finished(handle, None, "usage")
    assert stream.read() == [SampleEnded(1, "end"), Ended(None, "usage")]
    assert len(streams) == 0


def test_positions_coalesce_and_never_hide_the_acceptance() -> None:
    streams = connected()
    stream = opened(streams, wants_positions=True)
    streams.take(PLENTY)
    streams.on_accepted(stream.handle, "id", "third")
    streams.on_position(stream.handle, "second")
    assert stream.read() == [Accepted("id", "second")]
    streams.on_position(stream.handle, "first")
    streams.on_position(stream.handle, "next")
    assert stream.read() == [Positioned("next")]


def test_agreeing_overlap_is_dropped() -> None:
    streams = connected()
    stream = accepted(streams)
    frame(streams, stream.handle, 0, [1, 2, 3])
    frame(streams, stream.handle, 1, [2, 3, 4])
    assert stream.read() == [Tokens(0, 0, [1, 2, 3, 4], [])]


def test_differing_overlap_ends_the_request() -> None:
    streams = connected()
    stream = accepted(streams)
    handle = stream.handle
    frame(streams, handle, 0, [1, 2])
    frame(streams, handle, 1, [9])
    *_, last = stream.read()
    assert isinstance(last, Ended)
    assert last.failure is not None
    assert last.failure.reason is Reason.INTERNAL
    assert streams.take(PLENTY).cancels == [Cancel(handle)]
    frame(streams, handle, 2, [3])
    streams.on_finished(handle, None, None)
    assert stream.read() == []
    assert len(streams) == 0


def test_tokens_behind_the_end_are_a_divergence() -> None:
    streams = connected()
    stream = accepted(streams)
    frame(streams, stream.handle, 0, [1])
    end(streams, stream.handle, 1)
    frame(streams, stream.handle, 1, [2])
    assert isinstance(stream.read()[-1], Ended)


def test_a_gap_resumes_from_the_next_index_under_a_new_handle() -> None:
    streams = connected()
    stream = accepted(streams)
    old = stream.handle
    frame(streams, old, 0, [1])
    frame(streams, old, 2, [3])
    frame(streams, old, 1, [2])  # the old handle has no meaning any more
    (resume,) = streams.take(PLENTY).resumes
    assert (resume.request_id, resume.next_index) == (f"id-{stream.key}", (1,))
    assert resume.handle > old
    frame(streams, resume.handle, 1, [2, 3])
    assert stream.read() == [Tokens(0, 0, [1, 2, 3], [])]


def test_an_end_or_a_finish_that_lacks_tokens_is_a_gap() -> None:
    streams = connected()
    stream = accepted(streams)
    end(streams, stream.handle, 2)
    assert len(streams.take(PLENTY).resumes) == 1
    streams.on_finished(stream.handle, None, None)
    assert len(streams.take(PLENTY).resumes) == 1
    assert stream.read() == []


def test_gaps_without_progress_are_bounded() -> None:
    streams = connected()
    stream = accepted(streams)
    for _ in range(MAX_RESUMES):
        frame(streams, stream.handle, 5, [1])
        assert stream.read() == []
        streams.take(PLENTY)
    frame(streams, stream.handle, 5, [1])
    assert isinstance(stream.read()[-1], Ended)


def test_commands_come_in_bounded_messages_and_cancels_do_not_overtake() -> None:
    streams = connected()
    first, second = opened(streams, num_bytes=100), accepted(streams)
    streams.disconnected()
    streams.connected()
    streams.cancel(second)
    one = streams.take(100)
    assert ([submit.handle for submit in one.submits], one.resumes, one.cancels) == (
        [first.handle],
        [],
        [],
    )
    two = streams.take(100)
    assert [resume.handle for resume in two.resumes] == [second.handle]
    assert two.cancels == [Cancel(second.handle)]


def test_handles_that_run_out_ask_for_a_new_connection() -> None:
    streams = connected()
    assert not streams.is_exhausted
    streams._handles._next = MAX_HANDLE // 2 + 1
    assert streams.is_exhausted
    streams.disconnected()
    streams.connected()
    assert not streams.is_exhausted


def test_messages_about_unknown_handles_mean_nothing() -> None:
    streams = connected()
    streams.on_accepted(99, "id", None)
    assert not streams.on_rejected(99, Failure(Reason.NOT_LEADER, "x"))
    streams.on_position(99, None)
    frame(streams, 99, 0, [1])
    end(streams, 99, 1)
    streams.on_finished(99, None, None)
    assert not streams.take(PLENTY)


def test_handles_of_one_message_rise_in_the_order_of_its_reading() -> None:
    streams = connected()
    known = accepted(streams)
    streams.disconnected()
    streams.connected()
    opened(streams, "new")
    commands = streams.take(PLENTY)
    assert [submit.handle for submit in commands.submits] == [1]
    assert [resume.handle for resume in commands.resumes] == [known.handle] == [2]


def test_alternatives_belong_to_the_tokens_that_are_taken() -> None:
    streams = connected()
    stream = accepted(streams, num_samples=2, wants_logprobs=True)
    plain = accepted(streams)
    mine, other = stream.handle, plain.handle
    streams.on_frame(
        Frame(
            [mine, other, mine + 1],
            [0, 0, 0],
            [5, 9, 6],
            [-1.0, math.nan, -2.0],
            [],
            Alternatives([2, 0, 2], [5, 7, 6, 8], [-1.0, -1.5, -2.0, -2.5]),
        )
    )
    # the first entry was seen before
    streams.on_frame(
        Frame(
            [mine, mine],
            [0, 1],
            [5, 4],
            [-1.0, -3.0],
            [],
            Alternatives([2, 2], [5, 7, 4, 3], [-1.0, -1.5, -3.0, -3.5]),
        )
    )
    assert stream.read() == [
        Tokens(0, 0, [5, 4], [-1.0, -3.0], [5, 7, 4, 3], [-1.0, -1.5, -3.0, -3.5]),
        Tokens(1, 0, [6], [-2.0], [6, 8], [-2.0, -2.5]),
    ]
    assert not any(sample.top_token_ids or sample.top_logprobs for sample in stream.samples)
    assert plain.read() == [Tokens(0, 0, [9], [])]


def test_alternatives_are_cut_where_the_consumer_stands() -> None:
    streams = connected()
    stream = accepted(streams, wants_logprobs=True)
    for index in range(2):
        tops = Alternatives([1], [index + 20], [-index - 0.5])
        streams.on_frame(Frame([stream.handle], [index], [index + 10], [-1.0], [], tops))
        assert stream.read() == [
            Tokens(0, index, [index + 10], [-1.0], [index + 20], [-index - 0.5])
        ]


def test_scores_come_once_and_before_the_tokens() -> None:
    streams = connected()
    stream = accepted(streams)
    frame(streams, stream.handle, 0, [1])
    streams.on_scores(stream.handle, "scores")
    assert stream.read() == [Scored("scores"), Tokens(0, 0, [1], [])]
    streams.disconnected()
    streams.connected()
    streams.take(PLENTY)
    streams.on_scores(stream.handle, "scores")
    assert stream.read() == []
