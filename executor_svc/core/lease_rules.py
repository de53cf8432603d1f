"""What a lease must satisfy before an engine takes it.

Rule: whatever can be wrong with a lease is found here, before it shares a step with others. What
only compiling can tell of a grammar is found by whoever compiles it, at the same time.
"""

import itertools
import math
from collections.abc import Sequence

from executor_svc.core.engine import (
    Grammar,
    GrammarKind,
    InvalidLeaseError,
    LeaseRequest,
    ModelInfo,
    PromptScoring,
    SamplingParams,
)
from headway.reasons import Reason


def check_lease(request: LeaseRequest, model: ModelInfo, *, can_match_text: bool) -> None:
    """Raise InvalidLeaseError unless ``model`` can run the lease.

    ``can_match_text`` says whether the engine knows the bytes of the model's tokens, which stop
    strings and grammars need.
    """
    params = request.params
    if request.model != model.name:
        raise InvalidLeaseError(
            Reason.MODEL_NOT_FOUND, f"model {request.model!r} is not served here"
        )
    problem = (
        _problem_of_params(params, model.vocab_size)
        or _problem_of_adjustments(params, model.vocab_size)
        or _problem_of_grammar(params.grammar)
        or _problem_of_samples(request)
        or _problem_of_scoring(request, model.vocab_size)
    )
    if problem:
        raise InvalidLeaseError(Reason.INVALID_REQUEST, problem)
    for what, is_there in (("stop strings", params.stop_strings), ("grammars", params.grammar)):
        if is_there and not can_match_text:
            raise InvalidLeaseError(
                Reason.INVALID_REQUEST, f"{what} need a tokenizer, {model.name} has none"
            )
    if not all(
        _are_tokens(token_ids, model.vocab_size)
        for token_ids in (request.prompt_token_ids, *request.generated)
    ):
        raise InvalidLeaseError(Reason.INVALID_REQUEST, "a token id is not in the vocabulary")
    needed = len(request.prompt_token_ids) + params.max_tokens
    if needed > model.max_context_tokens:
        raise InvalidLeaseError(
            Reason.PROMPT_TOO_LONG,
            f"prompt and max_tokens make {needed} tokens, the context holds "
            f"{model.max_context_tokens}",
        )


def _problem_of_params(params: SamplingParams, vocab_size: int) -> str | None:
    if params.max_tokens < 1:
        return "max_tokens must be at least 1"
    if params.min_tokens < 0:
        return "min_tokens must not be negative"
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        return "temperature must be a number from 0 on"
    if params.top_k < 0:
        return "top_k must not be negative"
    if not 0 < params.top_p <= 1:
        return "top_p must be above 0 and at most 1"
    if not 0 <= params.min_p <= 1:
        return "min_p must be from 0 to 1"
    if params.top_logprobs < 0:
        return "top_logprobs must not be negative"
    if not _are_tokens(params.stop_token_ids, vocab_size):
        return "a stop token id is not in the vocabulary"
    if not all(params.stop_strings):
        return "a stop string is empty"
    return None


def _problem_of_adjustments(params: SamplingParams, vocab_size: int) -> str | None:
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= getattr(params, name) <= 2:
            return f"{name} must be from -2 to 2"
    if not 0 < params.repetition_penalty < math.inf:
        return "repetition_penalty must be a number above 0"
    token_ids = [token_id for token_id, _ in params.logit_bias]
    if not _are_tokens(token_ids, vocab_size):
        return "logit_bias: a token id is not in the vocabulary"
    if len(set(token_ids)) < len(token_ids):
        return "logit_bias: a token comes twice"
    if not all(-100 <= bias <= 100 for _, bias in params.logit_bias):
        return "logit_bias: a bias must be from -100 to 100"
    return None


def _problem_of_grammar(grammar: Grammar | None) -> str | None:
    if grammar is None:
        return None
    problems = map(_problem_of_node, grammar.nodes())
    return next((problem for problem in problems if problem is not None), None)


def _problem_of_node(grammar: Grammar) -> str | None:
    sources, parts = grammar.sources, grammar.parts
    match grammar.kind:
        case GrammarKind.SEQUENCE | GrammarKind.ANY_OF:
            return None if parts else f"grammar: {grammar.kind} has no parts"
        case GrammarKind.REPETITION:
            least, most = grammar.times
            if len(parts) != 1:
                return "grammar: repetition has one part"
            is_empty = most is not None and most < max(1, least)
            return "grammar: repetition has no room" if is_empty else None
        case GrammarKind.JSON_OBJECT:
            return "grammar: json_object has no source" if sources else None
        case GrammarKind.CHOICE:
            if not sources:
                return "grammar: choice has no texts"
            return "grammar: choice has a text twice" if len(set(sources)) < len(sources) else None
        case _:
            if len(sources) != 1:
                return f"grammar: {grammar.kind} needs one source"
            is_empty = grammar.kind is GrammarKind.TEXT_UNTIL and not sources[0]
            return "grammar: text_until is empty" if is_empty else None


def _problem_of_samples(request: LeaseRequest) -> str | None:
    if not request.prompt_token_ids:
        return "the prompt is empty"
    if request.num_samples < 1:
        return "num_samples must be at least 1"
    if len(request.generated) not in (0, request.num_samples):
        return "generated must have one entry for each sample"
    if any(len(tokens) > request.params.max_tokens for tokens in request.generated):
        return "generated has more than max_tokens tokens"
    return None


def _problem_of_scoring(request: LeaseRequest, vocab_size: int) -> str | None:
    scoring = request.scoring
    if scoring is None:
        return None
    if not 0 <= scoring.top_logprobs <= vocab_size:
        return "prompt_scoring.top_logprobs must be from 0 to the size of the vocabulary"
    for name in ("last_n", "num_alternatives"):
        if getattr(scoring, name) < 0:
            return f"prompt_scoring.{name} must not be negative"
    return _problem_of_targets(scoring, len(request.prompt_token_ids), vocab_size)


def _problem_of_targets(
    scoring: PromptScoring, num_prompt_tokens: int, vocab_size: int
) -> str | None:
    offsets, token_ids = scoring.target_offsets, scoring.target_token_ids
    if not offsets:
        return "prompt_scoring.target_token_ids without target_offsets" if token_ids else None
    if len(offsets) != num_prompt_tokens:
        return "prompt_scoring.target_offsets must have an entry for each token of the prompt"
    if offsets[0] != 0 or offsets[-1] != len(token_ids):
        return "prompt_scoring.target_offsets must run from 0 to the number of target_token_ids"
    if any(a > b for a, b in itertools.pairwise(offsets)):
        return "prompt_scoring.target_offsets must not fall"
    if not _are_tokens(token_ids, vocab_size):
        return "prompt_scoring.target_token_ids: a token id is not in the vocabulary"
    return None


def _are_tokens(token_ids: Sequence[int], vocab_size: int) -> bool:
    return not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size)
