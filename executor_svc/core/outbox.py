"""What the scheduler is to be told on the present stream.

Rule: nothing is copied in here. Tokens stay in their samples, behind a cursor; the outbox only
knows which samples and leases to look at. So steps merge while a write is under way, and sending
again is moving a cursor back. The scores of a prompt go out before any token.
"""

from dataclasses import replace

from executor_svc.core.leases import Lease, Sample, append_tokens, num_entries_of
from executor_svc.core.messages import Frame, LeaseEnded


class Outbox:
    """Lives as long as a stream."""

    def __init__(self) -> None:
        self.dirty: dict[int, Sample] = {}  # by key; something lies behind the cursor
        self.scored: dict[int, Lease] = {}  # by key; the scores of its prompt are not sent yet
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
        self.scored.pop(lease.key, None)

    def forget(self, lease: Lease) -> None:
        """Say nothing more about a lease."""
        for sample in lease.samples:
            self.dirty.pop(sample.key, None)
        self.scored.pop(lease.key, None)
        self.ending.pop(lease.ref.request_id, None)

    def take_frame(self, max_entries: int) -> Frame:
        """The oldest unsent scores and tokens; they count as sent.

        Each token, alternative and score is an entry. Scores that are too many go out alone.
        """
        frame = Frame()
        room = max_entries - self._take_scores(frame, max_entries)
        if room > 0:
            self._take_tokens(frame, room)
        return frame

    def _take_scores(self, frame: Frame, room: int) -> int:
        """Gives the entries taken."""
        num_taken = 0
        for key, lease in list(self.scored.items()):
            assert lease.scores is not None
            num_entries = num_entries_of(lease.scores)
            if num_taken and num_taken + num_entries > room:
                return room  # a token must not overtake what is left
            frame.prompt_scores.append(replace(lease.scores, key=lease.handle))
            num_taken += num_entries
            del self.scored[key]
        return num_taken

    def _take_tokens(self, frame: Frame, room: int) -> None:
        done = []
        for key, sample in self.dirty.items():
            start, stop, weight = sample.num_sent, len(sample.token_ids), sample.token_weight
            if (stop - start) * weight > room:
                stop = start + -(-room // weight)  # rounded up
            room -= (stop - start) * weight
            append_tokens(frame, sample, start, stop)
            sample.num_sent = stop
            if stop < len(sample.token_ids):
                break
            # The end goes with the last token, so that nobody holds all tokens but no end.
            if sample.end is not None and not sample.is_end_sent:
                frame.ends.append(replace(sample.end, key=sample.handle))
                sample.is_end_sent = True
            done.append(key)
            if room <= 0:
                break
        for key in done:
            del self.dirty[key]

    def take_ends(self) -> tuple[LeaseEnded, ...]:
        """Last words on leases whose tokens and scores are all sent, and all answers."""
        ready = [
            lease
            for lease in self.ending.values()
            if lease.key not in self.scored
            and not any(sample.key in self.dirty for sample in lease.samples)
        ]
        for lease in ready:
            del self.ending[lease.ref.request_id]
        ended = (*self.answers, *(lease.last_word() for lease in ready))
        self.answers.clear()
        return ended
