"""The executor's side of the token path: from step frames into the buffers of requests.

Rule: executors are not trusted. An entry counts if its handle was granted on this session, its
index is the next one, its token is in the vocabulary and there is room; before the scores of a
prompt that is to be scored there is none. What else can come:

- a handle of a lease that is over: dropped, because such frames are on their way legitimately;
- an index that is held already: compared; a difference faults the attempt, never the stream;
- anything else: ``HeadwayError``, and the caller closes the session.

This is the hot path (a few hundred nanoseconds for each token): no object for each token.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from scheduler_svc import scores
from scheduler_svc.outputs import Output
from scheduler_svc.routes import Lease, Route

_MAX_HANDLE = (1 << 32) - 1


@dataclass(slots=True)
class FrameNews:
    """What the core must hear about a frame."""

    started: list[Lease] = field(default_factory=list)
    faults: dict[Lease, str] = field(default_factory=dict)


class Routes:
    """The handles of one executor session."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._routes: dict[int, Route] = {}
        self._leases: dict[tuple[str, int, int], Lease] = {}
        self._num_rich = 0  # leases whose tokens have alternatives
        self._next_handle = 1
        self.num_dropped = 0

    def has_room(self, output: Output) -> bool:
        """Whether there are handles for one more lease."""
        return self._next_handle + output.num_samples - 1 <= _MAX_HANDLE

    def open(self, output: Output, attempt: int) -> Lease:
        """A lease begins; gives it the next handles. An earlier lease is cut off."""
        output.seal()
        lease = Lease(output.request_id, self._epoch, attempt, self._next_handle, output)
        self._next_handle += output.num_samples
        self._leases[lease.request_id, lease.epoch, attempt] = lease
        self._num_rich += output.num_top > 0
        for sample in range(output.num_samples):
            self._routes[lease.handle + sample] = Route(lease, sample)
        output.mute = partial(self.mute, lease)
        return lease

    def find(self, ref: fleet.LeaseRef) -> Lease | None:
        """A lease that has not ended on this session."""
        return self._leases.get((ref.request_id, ref.epoch, ref.attempt))

    def mute(self, lease: Lease) -> None:
        """Drop the lease's tokens from here on; its end is still to come."""
        lease.is_muted = True
        for handle in range(lease.handle, lease.handle + lease.output.num_samples):
            self._routes.pop(handle, None)

    def close(self, lease: Lease) -> None:
        """The lease is over."""
        self.mute(lease)
        if self._leases.pop((lease.request_id, lease.epoch, lease.attempt), None) is not None:
            self._num_rich -= lease.output.num_top > 0

    def has_leases(self) -> bool:
        """Whether there is a lease that is to go on."""
        return any(not lease.is_muted for lease in self._leases.values())

    def lost(self, heartbeat: fleet.ExecutorHeartbeat) -> list[Lease]:
        """Leases that arrived at the executor and that it does not list any more."""
        listed = set(heartbeat.handles)
        return [
            lease
            for lease in self._leases.values()
            if lease.handle <= heartbeat.last_handle and lease.handle not in listed
        ]

    def incomplete(self, lease: Lease, num_tokens: list[int]) -> str | None:
        """Why a lease that claims completion is not complete; None if it is."""
        output = lease.output
        held = [len(tokens) for tokens in output.token_ids]
        if num_tokens != held:
            return f"the executor counts {num_tokens} tokens, {held} arrived"
        if None in output.ends:
            return f"sample {output.ends.index(None)} has no end"
        return "the prompt's scores never came" if output.lacks_scores else None

    def accept_frame(self, frame: generation.StepFrame) -> FrameNews:
        """Take in a frame and wake whoever reads its requests. Raises HeadwayError."""
        news = FrameNews()
        touched: dict[Lease, None] = {}
        try:
            for prompt_scores in frame.prompt_scores:
                self._accept_scores(prompt_scores)
            if frame.handle:
                self._accept_tokens(frame, news, touched)
            for end in frame.ends:
                self._accept_end(end, news, touched)
        finally:
            for lease in touched:
                if not lease.has_started:
                    lease.has_started = True
                    news.started.append(lease)
                for follower in lease.output.followers:
                    if not follower.is_dirty:
                        follower.mark()
        return news

    def _accept_tokens(
        self, frame: generation.StepFrame, news: FrameNews, touched: dict[Lease, None]
    ) -> None:
        num_entries = len(frame.handle)
        if len(frame.index) != num_entries or len(frame.token_id) != num_entries:
            raise _protocol_error("the arrays of a frame differ in length")
        if frame.logprob and len(frame.logprob) != num_entries:
            raise _protocol_error("logprob is not parallel to handle")
        if frame.num_top or self._num_rich:
            self._accept_alternatives(frame, news, touched)
            return
        find = self._routes.get
        isfinite = math.isfinite
        logprobs = frame.logprob or repeat(math.nan)
        for handle, index, token_id, logprob in zip(  # noqa: B905
            frame.handle[:], frame.index[:], frame.token_id[:], logprobs
        ):
            route = find(handle)
            if route is None:
                self._drop(handle)
                continue
            tokens = route.token_ids
            if index != len(tokens):
                self._accept_overlap(route, index, token_id, news)
                continue
            if token_id >= route.vocab_size or index >= route.limit:
                raise _bad_token(route, token_id)
            if route.logprobs is not None:
                if not isfinite(logprob):
                    raise _protocol_error("a logprob is missing or not finite")
                route.logprobs.append(logprob)
            tokens.append(token_id)
            touched[route.lease] = None

    def _accept_alternatives(
        self, frame: generation.StepFrame, news: FrameNews, touched: dict[Lease, None]
    ) -> None:
        """The same for a frame in which some tokens have alternatives, or should."""
        num_tops = frame.num_top[:] or [0] * len(frame.handle)
        top_token_ids, top_logprobs = frame.top_token_id[:], frame.top_logprob[:]
        if len(num_tops) != len(frame.handle):
            raise _protocol_error("num_top is not parallel to handle")
        if not sum(num_tops) == len(top_token_ids) == len(top_logprobs):
            raise _protocol_error("the alternatives are not as many as num_top says")
        logprobs = frame.logprob or repeat(math.nan)
        stop = 0
        for num_top, handle, index, token_id, logprob in zip(  # noqa: B905
            num_tops, frame.handle[:], frame.index[:], frame.token_id[:], logprobs
        ):
            start, stop = stop, stop + num_top
            route = self._routes.get(handle)
            if route is None:
                self._drop(handle)
                continue
            if index != len(route.token_ids):
                self._accept_overlap(route, index, token_id, news)
                continue
            if token_id >= route.vocab_size or index >= route.limit:
                raise _bad_token(route, token_id)
            token_ids, token_logprobs = top_token_ids[start:stop], top_logprobs[start:stop]
            if num_top != route.num_top:
                raise _protocol_error(f"{num_top} alternatives came, {route.num_top} were due")
            if not scores.are_alternatives(token_ids, token_logprobs, route.vocab_size):
                raise _protocol_error("an alternative is not in the vocabulary or not finite")
            if route.logprobs is not None:
                if not math.isfinite(logprob):
                    raise _protocol_error("a logprob is missing or not finite")
                route.logprobs.append(logprob)
            route.top_token_ids.extend(token_ids)
            route.top_logprobs.extend(token_logprobs)
            route.token_ids.append(token_id)
            touched[route.lease] = None

    def _accept_scores(self, received: generation.PromptScores) -> None:
        route = self._routes.get(received.handle)
        if route is None:
            self._drop(received.handle)
            return
        lease, output = route.lease, route.lease.output
        if output.scoring is None or route.sample:
            raise _protocol_error("scores came that nobody asked for")
        if output.prompt_scores is not None:
            return  # an earlier attempt's: said twice
        fault = scores.find_fault(
            received,
            output.scoring,
            num_prompt_tokens=output.num_prompt_tokens,
            vocab_size=output.vocab_size,
        )
        if fault is not None:
            raise _protocol_error(f"prompt_scores: {fault}")
        own = generation.PromptScores()
        own.CopyFrom(received)
        own.handle = 0
        output.prompt_scores = own
        for handle in range(lease.handle, lease.handle + output.num_samples):
            self._routes[handle].set_limit()
        output.mark()

    def _accept_overlap(self, route: Route, index: int, token_id: int, news: FrameNews) -> None:
        num_held = len(route.token_ids)
        if index > num_held:
            raise _protocol_error(f"token {index} came where {num_held} was due")
        if route.token_ids[index] != token_id:
            self._fault(route.lease, f"token {index} of sample {route.sample} changed", news)

    def _accept_end(
        self, end: generation.SequenceEnd, news: FrameNews, touched: dict[Lease, None]
    ) -> None:
        route = self._routes.get(end.handle)
        if route is None:
            self._drop(end.handle)
            return
        if end.reason not in (
            generation.FINISH_REASON_STOP,
            generation.FINISH_REASON_LENGTH,
        ):
            raise _protocol_error("a sequence ends without a reason")
        lease, sample = route.lease, route.sample
        if end.num_tokens != len(route.token_ids):
            message = f"sample {sample} ends at {end.num_tokens}, {len(route.token_ids)} arrived"
            self._fault(lease, message, news)
            return
        own = generation.SequenceEnd()
        own.CopyFrom(end)
        own.handle = sample
        known = lease.output.ends[sample]
        if known is not None and known != own:
            self._fault(lease, f"the end of sample {sample} changed", news)
            return
        lease.output.ends[sample] = own
        route.limit = len(route.token_ids)
        touched[lease] = None

    def _drop(self, handle: int) -> None:
        if not 0 < handle < self._next_handle:
            raise _protocol_error(f"handle {handle} was never granted")
        self.num_dropped += 1

    def _fault(self, lease: Lease, message: str, news: FrameNews) -> None:
        news.faults[lease] = message
        self.close(lease)


def _bad_token(route: Route, token_id: int) -> HeadwayError:
    if token_id >= route.vocab_size:
        return _protocol_error(f"token {token_id} is not in the vocabulary")
    if route.lease.output.lacks_scores:
        return _protocol_error("a token came before the prompt's scores")
    return _protocol_error(f"a token came past the end of sample {route.sample}")


def _protocol_error(message: str) -> HeadwayError:
    return HeadwayError(Reason.INVALID_REQUEST, message, field="frame")
