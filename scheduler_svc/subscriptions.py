"""The client's side of the token path: cursors into the buffers of requests.

A feed belongs to one client stream and remembers which subscriptions have news. Its one writer
calls ``take`` whenever the last write is done: everything that gathered goes into one message.
"""

import math
from collections.abc import Callable, Sequence

from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc import scores
from scheduler_svc.outputs import Output


class Subscription:
    """One stream follows one request from ``cursors`` on; ``handle`` names its first sample.

    The prompt's scores are sent once, whatever the cursors are: who resumes may lack them.
    """

    __slots__ = ("cursors", "feed", "handle", "has_scores", "is_dirty", "output", "sent_ends")

    def __init__(self, feed: "Feed", output: Output, handle: int, next_index: Sequence[int]):
        self.feed = feed
        self.output = output
        self.handle = handle
        # cut, because the client of a failed request may name samples that are not there
        known = next_index[: output.num_samples]
        self.cursors = [*known, *[0] * (output.num_samples - len(known))]
        self.sent_ends = [False] * output.num_samples
        self.has_scores = output.scoring is None and output.prompt_scores is None
        self.is_dirty = False

    def mark(self) -> None:
        """There is something to send."""
        self.feed.mark(self)


class _FrameBuilder:
    """Parallel lists, handed to protobuf in one go.

    ``num_extra`` is the weight of what is in besides tokens: 1 for each alternative and score.
    """

    __slots__ = (
        "ends",
        "handles",
        "indexes",
        "logprobs",
        "num_extra",
        "num_tops",
        "prompt_scores",
        "token_ids",
        "top_logprobs",
        "top_token_ids",
    )

    def __init__(self) -> None:
        self.handles: list[int] = []
        self.indexes: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ends: list[generation.SequenceEnd] = []
        self.num_tops: list[int] = []
        self.top_token_ids: list[int] = []
        self.top_logprobs: list[float] = []
        self.prompt_scores: list[generation.PromptScores] = []
        self.num_extra = 0

    def add(self, subscription: Subscription, room: int) -> bool:
        """Take up to ``room`` entries (a little more, where a token brings its alternatives along);
        True if nothing of the subscription is left."""
        if not subscription.has_scores:
            room = self._add_scores(subscription, room)
            if room < 0:
                return False
        output = subscription.output
        cursors = subscription.cursors
        weight = output.token_weight
        for sample, tokens in enumerate(output.token_ids):
            start, end = cursors[sample], len(tokens)
            if end > start:
                if (end - start) * weight > room:
                    end = start + max(0, -(-room // weight))  # rounded up
                self._add_tokens(subscription, sample, start, end)
                cursors[sample] = end
                room -= (end - start) * weight
                if end < len(tokens):
                    return False
            sequence_end = output.ends[sample]
            if sequence_end is not None and not subscription.sent_ends[sample]:
                subscription.sent_ends[sample] = True
                own = generation.SequenceEnd()
                own.CopyFrom(sequence_end)
                own.handle = subscription.handle + sample
                self.ends.append(own)
        return True

    def _add_scores(self, subscription: Subscription, room: int) -> int:
        """Gives the room that is left: negative if they have to wait; 0 if they are more than fit,
        for these go out alone."""
        known = subscription.output.prompt_scores
        if known is None:
            return room  # nor are there tokens
        num_entries = scores.num_entries(known)
        if num_entries > room and (self.handles or self.num_extra):
            return -1
        own = generation.PromptScores()
        own.CopyFrom(known)
        own.handle = subscription.handle
        self.prompt_scores.append(own)
        self.num_extra += num_entries
        subscription.has_scores = True
        return max(0, room - num_entries)

    def _add_alternatives(self, output: Output, sample: int, start: int, end: int) -> None:
        """Before the tokens themselves."""
        num_top = output.num_top
        self.num_extra += (end - start) * num_top
        self.num_tops.extend([0] * (len(self.handles) - len(self.num_tops)))
        self.num_tops.extend([num_top] * (end - start))
        first, last = start * num_top, end * num_top
        self.top_token_ids.extend(output.top_token_ids[sample][first:last])
        self.top_logprobs.extend(output.top_logprobs[sample][first:last])

    def _add_tokens(self, subscription: Subscription, sample: int, start: int, end: int) -> None:
        output = subscription.output
        tokens = output.token_ids[sample]
        if output.logprobs is not None:
            if len(self.logprobs) < len(self.handles):  # the first one in this frame that asked
                self.logprobs.extend([math.nan] * (len(self.handles) - len(self.logprobs)))
            self.logprobs.extend(output.logprobs[sample][start:end])
        elif self.logprobs:
            self.logprobs.extend([math.nan] * (end - start))
        if output.num_top:
            self._add_alternatives(output, sample, start, end)
        elif self.num_tops:
            self.num_tops.extend([0] * (end - start))
        handle = subscription.handle + sample
        if end - start == 1:
            self.handles.append(handle)
            self.indexes.append(start)
            self.token_ids.append(tokens[start])
        else:
            self.handles.extend([handle] * (end - start))
            self.indexes.extend(range(start, end))
            self.token_ids.extend(tokens[start:end])

    def fill(self, frame: generation.StepFrame) -> None:
        """Hand over to protobuf."""
        frame.handle.extend(self.handles)
        frame.index.extend(self.indexes)
        frame.token_id.extend(self.token_ids)
        frame.logprob.extend(self.logprobs)
        frame.ends.extend(self.ends)
        if self.num_tops:
            frame.num_top.extend(self.num_tops)
            frame.top_token_id.extend(self.top_token_ids)
            frame.top_logprob.extend(self.top_logprobs)
        frame.prompt_scores.extend(self.prompt_scores)


class Feed:
    """Everything that one client stream is to be told; ``wake`` is called when there is news."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._dirty: list[Subscription] = []
        self._accepted: list[scheduler.Accepted] = []
        self._rejected: list[scheduler.Rejected] = []
        # the latest of each handle
        self._positions: dict[int, scheduler.Position] = {}
        self.subscriptions: dict[int, Subscription] = {}

    def accept(self, accepted: scheduler.Accepted, *, can_wait: bool = False) -> None:
        """Answer a submit or resume; whoever says that it can wait sees to the waking."""
        self._accepted.append(accepted)
        if not can_wait:
            self._wake()

    def reject(self, rejected: scheduler.Rejected) -> None:
        """Refuse a submit or resume."""
        self._rejected.append(rejected)
        self._wake()

    def tell_position(self, position: scheduler.Position) -> None:
        """Tell where a waiting request stands."""
        self._positions[position.handle] = position
        self._wake()

    def subscribe(self, output: Output, handle: int, next_index: Sequence[int]) -> Subscription:
        """Follow a request from these indexes on."""
        subscription = Subscription(self, output, handle, next_index)
        self.subscriptions[handle] = subscription
        output.followers.append(subscription)
        if not output.is_empty:
            self.mark(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop following a request; what it had to tell is dropped."""
        if self.subscriptions.pop(subscription.handle, None) is not None:
            subscription.output.followers.remove(subscription)
            self._positions.pop(subscription.handle, None)

    def mark(self, subscription: Subscription) -> None:
        """The subscription has news."""
        if not subscription.is_dirty:
            subscription.is_dirty = True
            self._dirty.append(subscription)
            self._wake()

    @property
    def num_answers(self) -> int:
        """Answers to submits and resumes that wait to be taken."""
        return len(self._accepted) + len(self._rejected)

    @property
    def has_news(self) -> bool:
        """``take`` would give a message."""
        return bool(self._dirty or self._accepted or self._rejected or self._positions)

    def take(self, updates: scheduler.Updates, max_tokens: int) -> None:
        """Put everything that gathered into an empty message, at most ``max_tokens`` tokens (and
        alternatives, and scores)."""
        updates.accepted.extend(self._accepted)
        updates.rejected.extend(self._rejected)
        updates.positions.extend(self._positions.values())
        self._accepted, self._rejected, self._positions = [], [], {}
        dirty, self._dirty = self._dirty, []
        builder = _FrameBuilder()
        for number, subscription in enumerate(dirty):
            if subscription.handle not in self.subscriptions:
                continue  # left meanwhile
            room = max_tokens - len(builder.handles) - builder.num_extra
            if room <= 0:
                self._dirty = dirty[number:]
                break
            if not builder.add(subscription, room):
                self._dirty = [*dirty[number + 1 :], subscription]  # the others first
                break
            subscription.is_dirty = False
            result = subscription.output.result
            if result is not None:
                updates.finished.add(
                    handle=subscription.handle,
                    usage=result.usage,
                    timing=result.timing,
                    failure=result.failure if result.HasField("failure") else None,
                )
                self.unsubscribe(subscription)
        if builder.handles or builder.ends or builder.prompt_scores:
            builder.fill(updates.frame)
