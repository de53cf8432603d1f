"""What a lease must satisfy before an engine takes it.

Rule: whatever can be wrong with a lease is found here, before it shares a step with others.
"""

import math

from executor_svc.core.engine import InvalidLeaseError, LeaseRequest, ModelInfo, SamplingParams
from headway.reasons import Reason


def check_lease(request: LeaseRequest, model: ModelInfo, *, can_match_text: bool) -> None:
    """Raise InvalidLeaseError unless ``model`` can run the lease.

    ``can_match_text`` says whether the engine knows the bytes of the model's tokens, which stop
    strings need.
    """
    params = request.params
    if request.model != model.name:
        raise InvalidLeaseError(
            Reason.MODEL_NOT_FOUND, f"model {request.model!r} is not served here"
        )
    if problem := _problem_of_params(params, model.vocab_size) or _problem_of_samples(request):
        raise InvalidLeaseError(Reason.INVALID_REQUEST, problem)
    if params.stop_strings and not can_match_text:
        raise InvalidLeaseError(
            Reason.INVALID_REQUEST, f"stop strings need a tokenizer, {model.name} has none"
        )
    for token_ids in (request.prompt_token_ids, *request.generated):
        if not all(0 <= token_id < model.vocab_size for token_id in token_ids):
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
    if not all(0 <= token_id < vocab_size for token_id in params.stop_token_ids):
        return "a stop token id is not in the vocabulary"
    if not all(params.stop_strings):
        return "a stop string is empty"
    return None


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
