"""What a request has generated so far: one buffer for each sample, shared by all who read it.

Rule: ``token_ids[sample]`` only grows, in order of the index, up to ``max_tokens``. Readers keep
cursors into it, so a slow reader costs no memory. Attempts come and go; the output stays. Where the
prompt is to be scored no token is held before its scores are.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from headway.v1 import generation_pb2 as generation


class Follower(Protocol):
    """Whoever reads an output; ``mark`` is called when there is news and it is not yet dirty."""

    is_dirty: bool

    def mark(self) -> None:
        """Note that there is something to read."""


@dataclass(slots=True)
class Attempts:
    """What the attempts at a request left behind besides tokens."""

    executor_id: str = ""  # of the last one
    # of whoever made the last token; empty promises nothing
    exactness_class: str = ""
    is_inexact: bool = False
    num_cached_prompt_tokens: int = 0
    # leases that came back from a living executor without an end
    num_returns: int = 0

    def begin(self, executor_id: str, exactness_class: str, *, takes_over: bool) -> None:
        """An executor goes on with what there is; ``takes_over``: with tokens that came in its
        grant. In a lease that it held all along they are its own."""
        if takes_over and (not exactness_class or exactness_class != self.exactness_class):
            self.is_inexact = True
        self.executor_id = executor_id
        self.exactness_class = exactness_class
        self.num_cached_prompt_tokens = 0


class Output:
    """The tokens of one request. ``result`` is set once its end is committed.

    ``num_top`` alternatives of each token stand in ``top_token_ids[sample]`` and
    ``top_logprobs[sample]``, one token's after the other's. ``scoring`` is what the prompt of
    ``num_prompt_tokens`` is to be scored for, ``prompt_scores`` the answer, with handle 0.
    """

    __slots__ = (
        "attempts",
        "ends",
        "followers",
        "logprobs",
        "max_tokens",
        "mute",
        "num_prompt_tokens",
        "num_samples",
        "num_top",
        "prompt_scores",
        "request_id",
        "result",
        "scoring",
        "token_ids",
        "token_weight",
        "top_logprobs",
        "top_token_ids",
        "vocab_size",
    )

    def __init__(
        self,
        request_id: str,
        *,
        num_samples: int,
        max_tokens: int,
        vocab_size: int,
        has_logprobs: bool,
        num_top: int = 0,
        num_prompt_tokens: int = 0,
        scoring: generation.PromptScoring | None = None,
    ) -> None:
        self.request_id = request_id
        self.num_samples = num_samples
        self.max_tokens = max_tokens
        self.vocab_size = vocab_size
        self.token_ids = [array("I") for _ in range(num_samples)]
        self.logprobs = [array("f") for _ in range(num_samples)] if has_logprobs else None
        self.num_top = num_top
        self.token_weight = 1 + num_top  # in a frame: itself and its alternatives
        self.top_token_ids = [array("I") for _ in range(num_samples)]
        self.top_logprobs = [array("f") for _ in range(num_samples)]
        self.num_prompt_tokens = num_prompt_tokens
        self.scoring = scoring
        self.prompt_scores: generation.PromptScores | None = None
        self.attempts = Attempts()
        # handle is the number of the sample
        self.ends: list[generation.SequenceEnd | None] = [None] * num_samples
        self.followers: list[Follower] = []
        self.result: generation.GenerationResult | None = None
        # cuts off the one lease that may write here
        self.mute: Callable[[], None] | None = None

    @property
    def num_tokens(self) -> int:
        """Over all samples."""
        return sum(map(len, self.token_ids))

    @property
    def is_empty(self) -> bool:
        """There is nothing to read yet."""
        has_some = self.result is not None or self.prompt_scores is not None
        return not (has_some or any(self.token_ids) or any(self.ends))

    @property
    def lacks_scores(self) -> bool:
        """The prompt's scores are still to come."""
        return self.scoring is not None and self.prompt_scores is None

    def samples(self) -> list[generation.SampleResult]:
        """Everything so far, in order of the samples."""
        return [
            generation.SampleResult(
                token_ids=self.token_ids[sample],
                logprobs=self.logprobs[sample] if self.logprobs is not None else (),
                end=self.ends[sample],
                top_token_ids=self.top_token_ids[sample],
                top_logprobs=self.top_logprobs[sample],
            )
            for sample in range(self.num_samples)
        ]

    def mark(self) -> None:
        """There is news: tell the followers."""
        for follower in self.followers:
            if not follower.is_dirty:
                follower.mark()

    def seal(self) -> None:
        """Nothing is added from here on."""
        if self.mute is not None:
            self.mute()
            self.mute = None

    def finish(self, result: generation.GenerationResult) -> None:
        """The end is committed: tell the followers. Sealed once more, because a lease that was
        granted in the same batch as the end opens after the end was decided."""
        self.seal()
        self.result = result
        self.mark()

    @classmethod
    def replay(cls, request_id: str, result: generation.GenerationResult) -> Self:
        """The output of a request that finished earlier, from its stored result.

        A failed request has no samples: nothing but its end.
        """
        output = cls(
            request_id,
            num_samples=len(result.samples),
            max_tokens=max((len(sample.token_ids) for sample in result.samples), default=0),
            vocab_size=0,
            has_logprobs=any(sample.logprobs for sample in result.samples),
            num_top=max(map(_num_top, result.samples), default=0),
        )
        if result.HasField("prompt_scores"):
            output.prompt_scores = result.prompt_scores
        for number, sample in enumerate(result.samples):
            output.token_ids[number].extend(sample.token_ids)
            if output.logprobs is not None:
                output.logprobs[number].extend(sample.logprobs)
            output.top_token_ids[number].extend(sample.top_token_ids)
            output.top_logprobs[number].extend(sample.top_logprobs)
            output.ends[number] = sample.end
        output.finish(result)
        return output


def _num_top(sample: generation.SampleResult) -> int:
    """Alternatives of each token."""
    return len(sample.top_token_ids) // len(sample.token_ids) if sample.token_ids else 0
