"""The records of a session: a lease, its samples, and what of them goes into a frame.

Rule: a sample's ``num_sent`` says how many of its tokens went out on the present stream; all else
in it only grows. ``token_ids`` counts over all attempts, so an index is the same everywhere.
"""

from dataclasses import dataclass

from executor_svc.core.engine import PromptScores, SequenceEnd
from executor_svc.core.messages import Failure, Frame, Grant, LeaseEnded, LeaseRef, Outcome

MAX_SAMPLES = 4096
NAN = float("nan")


@dataclass(slots=True, eq=False)
class Sample:
    """One token stream of a lease; at most max_tokens are kept."""

    lease: "Lease"
    number: int
    token_ids: list[int]
    logprobs: list[float] | None  # parallel to token_ids, or None when not asked
    end: SequenceEnd | None
    num_sent: int
    is_end_sent: bool
    # num_top alternatives for each token, one token's after the other's
    num_top: int
    top_token_ids: list[int]
    top_logprobs: list[float]
    token_weight: int  # in a frame: a token and its alternatives

    @property
    def handle(self) -> int:
        return self.lease.handle + self.number

    @property
    def key(self) -> int:
        return self.lease.key + self.number


@dataclass(slots=True, eq=False)
class Lease:
    """One grant of a request. It has no samples when it was refused at the door."""

    ref: LeaseRef
    model: str
    num_slots: int  # of the executor's, from its grant to its end
    handle: int
    key: int
    samples: list[Sample]
    num_open: int  # samples without an end
    outcome: Outcome | None = None  # None while it runs
    failure: Failure | None = None
    scores: PromptScores | None = None  # of its prompt, once the engine has made them
    num_cached_prompt_tokens: int = 0
    # an earlier attempt made the scores, and they are not here
    are_scores_elsewhere: bool = False

    @property
    def num_tokens(self) -> tuple[int, ...]:
        return tuple(len(sample.token_ids) for sample in self.samples)

    def last_word(self) -> LeaseEnded:
        """How it ended."""
        assert self.outcome is not None
        return LeaseEnded(
            self.ref,
            self.outcome,
            self.num_tokens,
            self.failure,
            self.num_cached_prompt_tokens,
        )


def num_slots_of(grant: Grant, num_slots: int) -> int:
    """What a lease takes of an executor's slots; the scheduler reckons it in the same way."""
    return max(1, min(grant.num_samples, num_slots))


def new_sample(lease: Lease, number: int, grant: Grant) -> Sample:
    """Sample ``number`` with what earlier attempts made of it, which the scheduler knows."""
    token_ids: list[int] = []
    logprobs: list[float] = []
    top_token_ids: list[int] = []
    top_logprobs: list[float] = []
    end = None
    if grant.generated:
        before = grant.generated[number]
        token_ids, logprobs, end = list(before.token_ids), list(before.logprobs), before.end
        top_token_ids, top_logprobs = list(before.top_token_ids), list(before.top_logprobs)
    if not logprobs:
        logprobs = [NAN] * len(token_ids)
    return Sample(
        lease,
        number,
        token_ids,
        logprobs if grant.wants_logprobs else None,
        end,
        num_sent=len(token_ids),
        is_end_sent=end is not None,
        num_top=grant.params.top_logprobs,
        top_token_ids=top_token_ids,
        top_logprobs=top_logprobs,
        token_weight=1 + grant.params.top_logprobs,
    )


def append_tokens(frame: Frame, sample: Sample, start: int, stop: int) -> None:
    """Put tokens [start, stop) of a sample into a frame."""
    num_before = len(frame.handle)
    if start + 1 == stop:  # a paced engine: one token for each sequence, each step
        frame.handle.append(sample.handle)
        frame.index.append(start)
        frame.token_id.append(sample.token_ids[start])
    else:
        frame.handle.extend([sample.handle] * (stop - start))
        frame.index.extend(range(start, stop))
        frame.token_id.extend(sample.token_ids[start:stop])
    if sample.logprobs is not None:
        # The first that asked: those before it in the frame did not.
        frame.logprob.extend([NAN] * (num_before - len(frame.logprob)))
        frame.logprob.extend(sample.logprobs[start:stop])
    elif frame.logprob:
        frame.logprob.extend([NAN] * (stop - start))
    if sample.num_top:
        first, last = start * sample.num_top, stop * sample.num_top
        frame.num_top.extend([0] * (num_before - len(frame.num_top)))
        frame.num_top.extend([sample.num_top] * (stop - start))
        frame.top_token_id.extend(sample.top_token_ids[first:last])
        frame.top_logprob.extend(sample.top_logprobs[first:last])
    elif frame.num_top:
        frame.num_top.extend([0] * (stop - start))


def num_entries_of(scores: PromptScores) -> int:
    """How much scores weigh in a frame, where a token weighs 1."""
    return (
        len(scores.logprob)
        + len(scores.top_token_id)
        + len(scores.target_logprob)
        + len(scores.alternative_token_id)
    )


def find_fault(grant: Grant) -> str | None:
    """What would break the bookkeeping here; whether the work makes sense the engine knows."""
    if not 1 <= grant.num_samples <= MAX_SAMPLES:
        return f"num_samples must be from 1 to {MAX_SAMPLES}"
    if len(grant.generated) not in (0, grant.num_samples):
        return "generated must have one entry for each sample"
    for sample in grant.generated:
        num_tokens = len(sample.token_ids)
        if num_tokens > grant.params.max_tokens:
            return "generated has more than max_tokens tokens"
        if len(sample.logprobs) not in (0, num_tokens):
            return "generated has logprobs that do not match its tokens"
        num_top = num_tokens * grant.params.top_logprobs
        if not len(sample.top_token_ids) == len(sample.top_logprobs) == num_top:
            return "generated has alternatives that do not match its tokens"
        if sample.end is not None and sample.end.num_tokens != num_tokens:
            return "generated has an end that does not match its tokens"
    return None
