"""What travels on the Open stream, between its wire form and the words of ``core``.

Nothing is decided here: commands become messages, updates are told to the streams.
"""

from gateway_http.core.frames import Alternatives, Frame
from gateway_http.core.messages import Commands, Failure
from gateway_http.core.streams import Streams
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2, scheduler_pb2

_REASONS = {reason.value: reason for reason in Reason}


def unreachable() -> HeadwayError:
    """What clients are told while no scheduler answers."""
    return HeadwayError(Reason.NO_CAPACITY, "No scheduler can be reached.")


def decode_failure(failure: generation_pb2.Failure) -> Failure:
    """A Failure off the wire; names that we do not know count as INTERNAL."""
    retry_after_ms = failure.retry_after.ToMilliseconds() if failure.HasField("retry_after") else 0
    return Failure(
        _REASONS.get(failure.reason, Reason.INTERNAL),
        failure.message,
        retry_after_ms or None,
    )


def to_error(failure: Failure) -> HeadwayError:
    """A failure as the exception that the HTTP side knows."""
    return HeadwayError(failure.reason, failure.message, retry_after_ms=failure.retry_after_ms)


def encode_commands(commands: Commands) -> scheduler_pb2.ClientCommands:
    """Commands as their wire form."""
    message = scheduler_pb2.ClientCommands()
    for submit in commands.submits:
        message.submits.add(
            handle=submit.handle,
            request=submit.payload,
            detached=submit.is_detached,
            wants_positions=submit.wants_positions,
        )
    for resume in commands.resumes:
        message.resumes.add(
            handle=resume.handle,
            request_id=resume.request_id,
            tenant=resume.payload.tenant,
            next_index=resume.next_index,
        )
    for cancel in commands.cancels:
        message.cancels.add(handle=cancel.handle, leave=cancel.is_leaving)
    return message


def apply_updates(streams: Streams, updates: scheduler_pb2.Updates) -> bool:
    """Tell the streams what came; gives whether another scheduler must be asked instead."""
    is_elsewhere = False
    for accepted in updates.accepted:
        streams.on_accepted(accepted.handle, accepted.request_id, accepted.status)
    for rejected in updates.rejected:
        is_elsewhere |= streams.on_rejected(rejected.handle, decode_failure(rejected.failure))
    for position in updates.positions:
        streams.on_position(position.handle, position.status)
    if updates.HasField("frame"):
        frame = updates.frame
        for scores in frame.prompt_scores:
            streams.on_scores(scores.handle, scores)
        ends = [(end.handle, end.num_tokens, end) for end in frame.ends]
        alternatives = None
        if frame.num_top:
            alternatives = Alternatives(frame.num_top, frame.top_token_id[:], frame.top_logprob[:])
        streams.on_frame(
            Frame(frame.handle, frame.index, frame.token_id, frame.logprob, ends, alternatives)
        )
    for finished in updates.finished:
        failure = decode_failure(finished.failure) if finished.HasField("failure") else None
        streams.on_finished(finished.handle, failure, finished)
    return is_elsewhere
