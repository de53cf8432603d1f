"""What a request has generated so far: one buffer for each sample, shared by all who read it.

Rule: ``token_ids[sample]`` only grows, in order of the index, up to ``max_tokens``. Readers keep
cursors into it, so a slow reader costs no memory. Attempts come and go; the output stays.
"""

from array import array
from collections.abc import Callable
from typing import Protocol, Self

from headway.v1 import generation_pb2 as generation


class Follower(Protocol):
    """Whoever reads an output; ``mark`` is called when there is news and it is not yet dirty."""

    is_dirty: bool

    def mark(self) -> None:
        """Note that there is something to read."""


class Output:
    """The tokens of one request. ``result`` is set once its end is committed."""

    __slots__ = (
        "ends",
        "followers",
        "logprobs",
        "max_tokens",
        "mute",
        "num_samples",
        "request_id",
        "result",
        "token_ids",
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
    ) -> None:
        self.request_id = request_id
        self.num_samples = num_samples
        self.max_tokens = max_tokens
        self.vocab_size = vocab_size
        self.token_ids = [array("I") for _ in range(num_samples)]
        self.logprobs = [array("f") for _ in range(num_samples)] if has_logprobs else None
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

    def samples(self) -> list[generation.SampleResult]:
        """Everything so far, in order of the samples."""
        return [
            generation.SampleResult(
                token_ids=self.token_ids[sample],
                logprobs=self.logprobs[sample] if self.logprobs is not None else (),
                end=self.ends[sample],
            )
            for sample in range(self.num_samples)
        ]

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
        for follower in self.followers:
            if not follower.is_dirty:
                follower.mark()

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
        )
        for number, sample in enumerate(result.samples):
            output.token_ids[number].extend(sample.token_ids)
            if output.logprobs is not None:
                output.logprobs[number].extend(sample.logprobs)
            output.ends[number] = sample.end
        output.finish(result)
        return output
