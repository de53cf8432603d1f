"""What goes in and out of ``streams``: commands, events, and the record of one request.

A stream of tokens is kept whole until its request ends (at most max_tokens long): frames are
compared with it, and a consumer that lags reads it in larger pieces. ``payload``, ``status`` and
``detail`` belong to the shell and pass through untouched. Named tuples, because there are some for
each request: to make a frozen dataclass takes three times as long.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from headway.reasons import Reason


class Failure(NamedTuple):
    """Why a request did not succeed, in the words of the error table."""

    reason: Reason
    message: str
    retry_after_ms: int | None = None


# --- what the shell sends ---------------------------------------------------------------------


class Submit(NamedTuple):
    """Ask for a request; ``handle`` and its successors name its samples."""

    handle: int
    payload: Any
    is_detached: bool
    wants_positions: bool


class Resume(NamedTuple):
    """Follow an accepted request from ``next_index`` of each sample on."""

    handle: int
    request_id: str
    payload: Any
    next_index: tuple[int, ...]


class Cancel(NamedTuple):
    """End a request, or only stop following it."""

    handle: int
    is_leaving: bool = False


@dataclass(slots=True)
class Commands:
    """One message's worth of commands; the scheduler handles them in this order."""

    submits: list[Submit] = field(default_factory=list)
    resumes: list[Resume] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.submits or self.resumes or self.cancels)


# --- what a consumer reads --------------------------------------------------------------------


class Accepted(NamedTuple):
    """The request is in the scheduler's care."""

    request_id: str
    status: Any


class Positioned(NamedTuple):
    """Where the waiting request stands now; older positions are skipped."""

    status: Any


@dataclass(slots=True)
class Tokens:
    """Tokens ``first_index``.. of one sample; ``logprobs`` is empty unless they were asked for.

    ``top_token_ids`` and ``top_logprobs`` have the same number of alternatives for each token, one
    token's after the other's, likeliest first; none unless they were asked for.
    """

    sample: int
    first_index: int
    token_ids: list[int]
    logprobs: list[float]
    top_token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)


class Scored(NamedTuple):
    """What the model thinks of the prompt; once, before the first tokens, if it was asked for."""

    scores: Any


class SampleEnded(NamedTuple):
    """One sample is complete."""

    sample: int
    detail: Any


class Ended(NamedTuple):
    """Last event: the request succeeded, or not."""

    failure: Failure | None
    detail: Any = None


Event = Accepted | Positioned | Scored | Tokens | SampleEnded | Ended


@dataclass(slots=True)
class Sample:
    """One sample's tokens so far; ``num_read`` of them the consumer has seen.

    They are all kept, to tell what comes twice; what comes with them goes with the reading.
    """

    token_ids: list[int] = field(default_factory=list)
    # of the tokens that were not read
    logprobs: list[float] = field(default_factory=list)
    # num_top of each for each of these
    top_token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)
    num_top: int = 0
    end: SampleEnded | None = None
    num_read: int = 0
    is_end_read: bool = False

    @property
    def num_unread(self) -> int:
        """Tokens, and their alternatives, that the consumer has not seen."""
        return (len(self.token_ids) - self.num_read) * (1 + self.num_top)

    def read_tokens(self, number: int) -> Tokens:
        """The tokens that the consumer has not seen."""
        start = self.num_read
        tokens = Tokens(
            number,
            start,
            self.token_ids[start:],
            self.logprobs,
            self.top_token_ids,
            self.top_logprobs,
        )
        self.num_read = len(self.token_ids)
        self.logprobs, self.top_token_ids, self.top_logprobs = [], [], []
        return tokens


@dataclass(slots=True, eq=False)
class Stream:
    """One request. ``handle`` is 0 while this connection does not know it.

    ``is_kept``: it can be asked for again, by its key, so nobody's leaving ends it.
    ``is_followed``: it was submitted elsewhere, and cannot be submitted again from here.
    """

    key: int
    payload: Any
    num_samples: int
    num_bytes: int
    is_detached: bool
    is_kept: bool
    wants_positions: bool
    wants_logprobs: bool
    on_change: Callable[[], None]
    samples: list[Sample]
    handle: int = 0
    request_id: str = ""
    is_followed: bool = False
    is_accepted: bool = False
    is_cancelled: bool = False
    num_resumes: int = 0
    num_tokens_at_resume: int = 0
    unread: Accepted | Positioned | None = None
    scored: Scored | None = None
    is_scored_read: bool = False
    ended: Ended | None = None
    is_ended_read: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens held, over all samples."""
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def num_unread(self) -> int:
        """Tokens, and their alternatives, that ``read`` would give, over all samples."""
        return sum(sample.num_unread for sample in self.samples)

    def read(self) -> list[Event]:
        """Everything new since the last call; tokens of a sample come as one event."""
        events: list[Event] = []
        if self.unread is not None:
            events.append(self.unread)
            self.unread = None
        if self.scored is not None and not self.is_scored_read:
            self.is_scored_read = True
            events.append(self.scored)
        for number, sample in enumerate(self.samples):
            if len(sample.token_ids) > sample.num_read:
                events.append(sample.read_tokens(number))
            if sample.end is not None and not sample.is_end_read:
                sample.is_end_read = True
                events.append(sample.end)
        if self.ended is not None and not self.is_ended_read:
            self.is_ended_read = True
            events.append(self.ended)
        return events
