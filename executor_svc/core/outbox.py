"""What the scheduler is to be told on the present stream.

Rule: nothing is copied in here. Tokens stay in their samples, behind a cursor; the outbox only
knows which samples and leases to look at. So steps merge while a write is under way, and sending
again is moving a cursor back.
"""

from dataclasses import replace

from executor_svc.core.leases import Lease, Sample, append_tokens
from executor_svc.core.messages import Frame, LeaseEnded


class Outbox:
    """Lives as long as a stream."""

    def __init__(self) -> None:
        self.dirty: dict[int, Sample] = {}  # by key; something lies behind the cursor
        self.ending: dict[str, Lease] = {}  # by request id; ended, and the end is not sent yet
        self.answers: list[LeaseEnded] = []  # on leases that are not held

    def rewind(self, sample: Sample, next_index: int) -> None:
        """Send again from here, with the end if there is one."""
        sample.num_sent, sample.is_end_sent = next_index, False
        if sample.end is not None or next_index < len(sample.token_ids):
            self.dirty[sample.key] = sample

    def drop_tokens(self, lease: Lease) -> None:
        """Count what is there as sent."""
        for sample in lease.samples:
            sample.num_sent = len(sample.token_ids)
            self.dirty.pop(sample.key, None)

    def forget(self, lease: Lease) -> None:
        """Say nothing more about a lease."""
        for sample in lease.samples:
            self.dirty.pop(sample.key, None)
        self.ending.pop(lease.ref.request_id, None)

    def take_frame(self, max_tokens: int) -> Frame:
        """The oldest unsent tokens; they count as sent."""
        frame = Frame()
        room = max_tokens
        done = []
        for key, sample in self.dirty.items():
            start = sample.num_sent
            stop = min(start + room, len(sample.token_ids))
            room -= stop - start
            append_tokens(frame, sample, start, stop)
            sample.num_sent = stop
            if stop < len(sample.token_ids):
                break
            # The end goes with the last token, so that nobody holds all tokens but no end.
            if sample.end is not None and not sample.is_end_sent:
                frame.ends.append(replace(sample.end, key=sample.handle))
                sample.is_end_sent = True
            done.append(key)
            if not room:
                break
        for key in done:
            del self.dirty[key]
        return frame

    def take_ends(self) -> tuple[LeaseEnded, ...]:
        """Last words on leases whose tokens are all sent, and all answers."""
        ready = [
            lease
            for lease in self.ending.values()
            if not any(sample.key in self.dirty for sample in lease.samples)
        ]
        for lease in ready:
            del self.ending[lease.ref.request_id]
        ended = (*self.answers, *(lease.last_word() for lease in ready))
        self.answers.clear()
        return ended
