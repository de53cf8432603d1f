"""What an engine is: the protocol between the worker thread and anything that makes tokens.

Rule: an engine is driven from one thread and never blocks except inside ``step``. It knows
leases only by integer keys that its driver chose; it knows nothing of streams, epochs or
attempts. A lease with key k holds the sequences k, k + 1, ... k + num_samples - 1: sample i has
the sequence key k + i, and the driver leaves room for them.

Life of a lease: ``add`` -> any number of ``step`` outputs that carry its tokens ->
one ``SequenceEnd`` for each sample, or one ``LeaseFailure`` -> the key is free again. After
``abort`` returns, no later step output mentions the key.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from headway.reasons import Reason


class FinishReason(StrEnum):
    """Why a sequence ended; anything else that ends a lease is a failure with a Reason."""

    STOP = "stop"
    LENGTH = "length"


class GrammarKind(StrEnum):
    """How ``Grammar.source`` is to be read."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    SEQUENCE = "sequence"
    ANY_OF = "any_of"
    REPETITION = "repetition"
    TEXT_UNTIL = "text_until"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of a sample may be (generation.proto).

    ``sources`` are the texts of a CHOICE, and one for other simple kinds; ``parts`` what SEQUENCE
    and ANY_OF are made of, and the one that a REPETITION repeats, ``times``, least and most.
    """

    kind: GrammarKind
    sources: tuple[str, ...] = ()
    parts: tuple["Grammar", ...] = ()
    times: tuple[int, int | None] = (1, 1)

    def nodes(self) -> Iterator["Grammar"]:
        """Itself, and all that it is made of."""
        yield self
        for part in self.parts:
            yield from part.nodes()


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """What to say about a prompt, at temperature 1 and before any cut.

    ``last_n`` 0 is the whole prompt. ``target_offsets`` is empty, or has one entry for each prompt
    token: entries [target_offsets[i], target_offsets[i + 1]) of ``target_token_ids`` are scored at
    position i + 1. ``num_alternatives`` tokens are drawn at each position after the first, with the
    request's own sampling parameters.
    """

    wants_logprobs: bool = False
    top_logprobs: int = 0
    last_n: int = 0
    target_offsets: Sequence[int] = ()
    target_token_ids: Sequence[int] = ()
    num_alternatives: int = 0


@dataclass(slots=True)
class PromptScores:
    """The answer, in the layout of generation.proto; ``key`` is the lease key."""

    key: int
    logprob: Sequence[float] = ()
    top_token_id: Sequence[int] = ()
    top_logprob: Sequence[float] = ()
    target_logprob: Sequence[float] = ()
    alternative_token_id: Sequence[int] = ()
    alternative_logprob: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Defaults leave the model's distribution as it is.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. The draw for
    a token depends on (seed, sample, index) only, so a sequence continues unchanged elsewhere.
    Penalties and bias are as in generation.proto; ``top_logprobs`` alternatives are reported with
    each token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_logprobs: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """One lease as the engine sees it.

    ``generated[i]`` are the tokens that sample i already has from an earlier attempt; they
    count against ``max_tokens`` and the next token is number ``len(generated[i])``.
    ``ended`` names samples that need no more work (their end is already known).
    """

    key: int
    model: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    num_samples: int = 1
    generated: tuple[Sequence[int], ...] = ()
    ended: frozenset[int] = frozenset()
    # What to say about the prompt, before the first token; None is nothing.
    scoring: PromptScoring | None = None
    # Prefix caches are shared inside one salt only; the tenant's name.
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """The last word on one sequence; ``key`` is the sequence key.

    The token that ended it (a stop token, or the one that completed a stop string) is part of
    the output, with its logprob. ``stop_string`` / ``stop_token_id`` say what matched, if any.
    """

    key: int
    num_tokens: int
    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class LeaseFailure:
    """The lease ended without all its sequences.

    ``detail`` is for the log; clients are told ``message``, or nothing in particular.
    """

    key: int
    reason: Reason
    detail: str
    message: str = ""


@dataclass(slots=True)
class StepOutput:
    """What one engine step made, as parallel arrays (one entry for each new token).

    ``key`` is the sequence key, ``index`` the token's number in its sequence, from 0.
    ``logprob`` is the natural log of the probability under the temperature-scaled distribution
    before any penalty, bias, grammar or cut (temperature 0 counts as 1).

    ``num_top`` is parallel to ``key``, or empty if no entry has alternatives; entry i has
    ``num_top[i]`` of them (its ``top_logprobs``, at most the vocabulary), likeliest first, in
    ``top_token_id`` and ``top_logprob``, one entry's after the other's. ``prompt_scores`` come once
    for each lease that asked, at the latest with the first token of its samples. ``num_cached``
    has, once for each lease, how many prompt tokens a cache had when it began.

    ``num_decoded`` and ``num_prefilled`` say what the step computed: rows of one token, and the
    tokens of longer chunks, whatever came of them.
    """

    key: list[int] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    token_id: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    ends: list[SequenceEnd] = field(default_factory=list)
    failures: list[LeaseFailure] = field(default_factory=list)
    num_top: list[int] = field(default_factory=list)
    top_token_id: list[int] = field(default_factory=list)
    top_logprob: list[float] = field(default_factory=list)
    prompt_scores: list[PromptScores] = field(default_factory=list)
    num_cached: dict[int, int] = field(default_factory=dict)
    num_decoded: int = 0
    num_prefilled: int = 0


@dataclass(frozen=True, slots=True)
class ModelAssets:
    """What a gateway needs to speak a model's language, as the bytes of the model's own files."""

    tokenizer_json: bytes
    tokenizer_config_json: bytes
    chat_template: str
    generation_config_json: bytes


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The engine's description of one model that it serves.

    ``weights_digest`` and ``assets_digest`` are hex SHA-256; two executors serve the same model
    only if both agree.
    """

    name: str
    family: str
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    weights_digest: str
    assets_digest: str
    dtype: str
    # On the device now, and how long bringing it there takes (None: not known).
    is_resident: bool = True
    load_ms: int | None = None
    # On its way there; an engine, which loads while nobody can ask it, never says so.
    is_loading: bool = False
    # See ModelOffer in fleet.proto; empty promises nothing.
    exactness_class: str = ""


class InvalidLeaseError(Exception):
    """A lease that this engine can never run, with the reason the client is to be told."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ModelLoadError(Exception):
    """A model could not be brought to the device; the text is for the log and for operators."""


class Engine(Protocol):
    """An engine; see the module's rule for who calls what, and when."""

    @property
    def models(self) -> tuple[ModelInfo, ...]: ...

    @property
    def num_slots(self) -> int:
        """Sequences that may run at once (vLLM's ``max_num_seqs``)."""
        ...

    @property
    def max_models(self) -> int:
        """Models that may be on the device at once."""
        ...

    def load(self, model: str, evict: tuple[str, ...]) -> int:
        """Put a model on the device (blocking), ``evict`` off it first; gives milliseconds taken.

        No lease of an evicted model is held. Raises ModelLoadError, and then ``model`` is absent.
        """
        ...

    def assets(self, model: str) -> ModelAssets: ...

    def add(self, request: LeaseRequest) -> None:
        """Take a lease; its sequences join at the next step. Raises InvalidLeaseError."""
        ...

    def abort(self, key: int) -> None:
        """Forget a lease between steps and free what it held; unknown keys are fine."""
        ...

    def has_work(self) -> bool: ...

    def step(self) -> StepOutput:
        """Run one step (blocking). A fault of one lease ends that lease only."""
        ...

    def close(self) -> None: ...
