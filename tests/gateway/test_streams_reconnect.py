"""The gateway's streams when connections break, and what was cancelled or kept meanwhile."""

from gateway_http.core.messages import Accepted, Cancel, Ended, Failure, Tokens
from gateway_http.core.streams import Streams
from headway.reasons import Reason
from tests.gateway.streams_at_work import MAX_RESUMES, PLENTY, accepted, connected, frame, opened


def test_reconnecting_resumes_the_accepted_and_resubmits_the_rest() -> None:
    streams = connected()
    known, unknown = accepted(streams, num_samples=2), opened(streams, "unknown")
    streams.take(PLENTY)
    frame(streams, known.handle + 1, 0, [7])
    streams.disconnected()
    streams.connected()
    commands = streams.take(PLENTY)
    assert [resume.next_index for resume in commands.resumes] == [(0, 1)]
    assert [submit.payload for submit in commands.submits] == ["unknown"]
    streams.on_accepted(known.handle, "id-1", "status")  # nothing new for the consumer
    assert known.read() == [Tokens(1, 0, [7], [])]
    assert unknown.read() == []


def test_a_cancel_of_what_was_never_sent_sends_nothing() -> None:
    streams = connected()
    stream = opened(streams)
    streams.cancel(stream)
    assert not streams.take(PLENTY)
    assert stream.read() == [Ended(Failure(Reason.CANCELLED, "The client went away."))]
    assert len(streams) == 0


def test_a_cancel_is_repeated_after_a_reconnect_until_confirmed() -> None:
    streams = connected()
    stream = accepted(streams)
    streams.cancel(stream)
    assert stream.read()[-1] == stream.ended
    streams.disconnected()
    streams.connected()
    commands = streams.take(PLENTY)
    assert [resume.handle for resume in commands.resumes] == [stream.handle]
    assert commands.cancels == [Cancel(stream.handle)]
    streams.on_finished(stream.handle, Failure(Reason.CANCELLED, "done"), None)
    assert stream.read() == []
    assert len(streams) == 0


def test_a_cancelled_request_whose_acceptance_was_lost_is_left_to_the_resume_grace() -> None:
    streams = connected()
    stream = opened(streams)
    streams.take(PLENTY)
    streams.cancel(stream)
    streams.disconnected()
    streams.connected()
    assert not streams.take(PLENTY)
    assert len(streams) == 0


def test_detached_requests_need_no_more_than_their_acceptance() -> None:
    streams = connected()
    stream = opened(streams, is_detached=True)
    streams.take(PLENTY)
    streams.on_accepted(stream.handle, "id", "status")
    assert stream.read() == [Accepted("id", "status")]
    assert len(streams) == 0


def test_rejections() -> None:
    streams = connected()
    refused = opened(streams)
    streams.take(PLENTY)
    full = Failure(Reason.QUEUE_FULL, "full", 1000)
    assert not streams.on_rejected(refused.handle, full)
    assert refused.read() == [Ended(full)]
    waiting = opened(streams)
    streams.take(PLENTY)
    assert streams.on_rejected(waiting.handle, Failure(Reason.NOT_LEADER, "ask another"))
    assert waiting.read() == []
    following = accepted(streams)
    assert streams.on_rejected(following.handle, Failure(Reason.DRAINING, "stopping"))
    assert following.read() == []
    assert len(streams) == 2


def test_a_forgotten_request_begins_anew_only_if_nothing_was_delivered() -> None:
    streams = connected()
    fresh, begun = accepted(streams, payload="fresh"), accepted(streams)
    frame(streams, begun.handle, 0, [1])
    begun.read()
    streams.disconnected()
    streams.connected()
    streams.take(PLENTY)
    unknown = Failure(Reason.REQUEST_NOT_FOUND, "unknown")
    streams.on_rejected(fresh.handle, unknown)
    streams.on_rejected(begun.handle, unknown)
    assert [submit.payload for submit in streams.take(PLENTY).submits] == ["fresh"]
    (end,) = begun.read()
    assert isinstance(end, Ended)
    assert end.failure is not None
    # whose client may send it again: it is not the client that is wrong
    assert end.failure.reason is Reason.NO_CAPACITY


def test_fail_all_ends_everything_once() -> None:
    streams = connected()
    streams_open = [accepted(streams), opened(streams)]
    gone = Failure(Reason.NO_CAPACITY, "gone")
    streams.fail_all(gone)
    streams.fail_all(gone)
    for stream in streams_open:
        assert stream.read() == [Ended(gone)]


def test_nothing_piles_up_while_no_scheduler_is_there() -> None:
    streams = Streams(MAX_RESUMES)
    for _ in range(3):
        streams.cancel(opened(streams))
    assert len(streams) == 0


def test_what_is_kept_is_left_and_not_cancelled() -> None:
    streams = connected()
    unsent = opened(streams, is_kept=True)
    streams.cancel(unsent)
    sent = opened(streams, is_kept=True)
    streams.take(PLENTY)
    late = sent.handle
    streams.cancel(sent)
    assert streams.take(PLENTY).cancels == [Cancel(late, is_leaving=True)]
    known = accepted(streams, is_kept=True)
    handle = known.handle
    frame(streams, handle, 0, [1])
    streams.cancel(known)
    assert [type(event) for event in known.read()] == [Tokens, Ended]
    assert streams.take(PLENTY).cancels == [Cancel(handle, is_leaving=True)]
    assert not streams.take(PLENTY)
    assert len(streams) == 0
    streams.on_accepted(late, "id", "status")  # means nothing any more
    frame(streams, late, 0, [1])


def test_following_resumes_from_the_first_token_and_never_submits() -> None:
    streams = connected()
    stream = opened(streams, request_id="id", num_samples=2, is_kept=True)
    commands = streams.take(PLENTY)
    assert not commands.submits
    assert [(one.request_id, one.next_index) for one in commands.resumes] == [("id", (0, 0))]
    streams.on_accepted(stream.handle, "id", "running")
    assert stream.read() == [Accepted("id", "running")]
    streams.cancel(stream)
    assert streams.take(PLENTY).cancels == [Cancel(1, is_leaving=True)]


def test_a_followed_request_that_is_not_there_ends() -> None:
    streams = connected()
    stream = opened(streams, request_id="id", is_kept=True)
    streams.take(PLENTY)
    failure = Failure(Reason.REQUEST_NOT_FOUND, "gone")
    assert not streams.on_rejected(stream.handle, failure)
    assert stream.read() == [Ended(failure)]
    assert len(streams) == 0
