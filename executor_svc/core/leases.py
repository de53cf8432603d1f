"""The records of a session: a lease, its samples, and what of them goes into a frame.

Rule: a sample's ``num_sent`` says how many of its tokens went out on the present stream; all else
in it only grows. ``token_ids`` counts over all attempts, so an index is the same everywhere.
"""

from dataclasses import dataclass

from executor_svc.core.engine import SequenceEnd
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
    handle: int
    key: int
    samples: list[Sample]
    num_open: int  # samples without an end
    outcome: Outcome | None = None  # None while it runs
    failure: Failure | None = None

    @property
    def num_tokens(self) -> tuple[int, ...]:
        return tuple(len(sample.token_ids) for sample in self.samples)

    def last_word(self) -> LeaseEnded:
        """How it ended."""
        assert self.outcome is not None
        return LeaseEnded(self.ref, self.outcome, self.num_tokens, self.failure)


def new_sample(lease: Lease, number: int, grant: Grant) -> Sample:
    """Sample ``number`` with what earlier attempts made of it, which the scheduler knows."""
    token_ids: list[int] = []
    logprobs: list[float] = []
    end = None
    if grant.generated:
        before = grant.generated[number]
        token_ids, logprobs, end = list(before.token_ids), list(before.logprobs), before.end
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
        if sample.end is not None and sample.end.num_tokens != num_tokens:
            return "generated has an end that does not match its tokens"
    return None
