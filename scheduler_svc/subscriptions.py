"""The client's side of the token path: cursors into the buffers of requests.

A feed belongs to one client stream and remembers which subscriptions have news. Its one writer
calls ``take`` whenever the last write is done: everything that gathered goes into one message.
"""

import math
from collections.abc import Callable, Sequence

from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.outputs import Output


class Subscription:
    """One stream follows one request from ``cursors`` on; ``handle`` names its first sample."""

    __slots__ = ("cursors", "feed", "handle", "is_dirty", "output", "sent_ends")

    def __init__(self, feed: "Feed", output: Output, handle: int, next_index: Sequence[int]):
        self.feed = feed
        self.output = output
        self.handle = handle
        # cut, because the client of a failed request may name samples that are not there
        known = next_index[: output.num_samples]
        self.cursors = [*known, *[0] * (output.num_samples - len(known))]
        self.sent_ends = [False] * output.num_samples
        self.is_dirty = False

    def mark(self) -> None:
        """There is something to send."""
        self.feed.mark(self)


class _FrameBuilder:
    """Parallel lists, handed to protobuf in one go."""

    __slots__ = ("ends", "handles", "indexes", "logprobs", "token_ids")

    def __init__(self) -> None:
        self.handles: list[int] = []
        self.indexes: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ends: list[generation.SequenceEnd] = []

    def add(self, subscription: Subscription, room: int) -> bool:
        """Take up to ``room`` tokens; True if nothing of the subscription is left."""
        output = subscription.output
        cursors = subscription.cursors
        for sample, tokens in enumerate(output.token_ids):
            start, end = cursors[sample], len(tokens)
            if end > start:
                if end - start > room:
                    end = start + room
                self._add_tokens(subscription, sample, start, end)
                cursors[sample] = end
                room -= end - start
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

    def _add_tokens(self, subscription: Subscription, sample: int, start: int, end: int) -> None:
        output = subscription.output
        tokens = output.token_ids[sample]
        if output.logprobs is not None:
            if len(self.logprobs) < len(self.handles):  # the first one in this frame that asked
                self.logprobs.extend([math.nan] * (len(self.handles) - len(self.logprobs)))
            self.logprobs.extend(output.logprobs[sample][start:end])
        elif self.logprobs:
            self.logprobs.extend([math.nan] * (end - start))
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

    def accept(self, accepted: scheduler.Accepted) -> None:
        """Answer a submit or resume."""
        self._accepted.append(accepted)
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
        """Put everything that gathered into an empty message, at most ``max_tokens`` tokens."""
        updates.accepted.extend(self._accepted)
        updates.rejected.extend(self._rejected)
        updates.positions.extend(self._positions.values())
        self._accepted, self._rejected, self._positions = [], [], {}
        dirty, self._dirty = self._dirty, []
        builder = _FrameBuilder()
        for number, subscription in enumerate(dirty):
            if subscription.handle not in self.subscriptions:
                continue  # left meanwhile
            room = max_tokens - len(builder.handles)
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
        if builder.handles or builder.ends:
            builder.fill(updates.frame)
