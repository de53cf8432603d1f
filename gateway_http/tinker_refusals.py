"""Refusals of the scheduler by the names that Tinker's clients give their parameters.

They begin with the name of a field of GenerationRequest (``checks.bad``).
"""

import re

from headway.errors import HeadwayError
from headway.reasons import Reason

_BEGINNING = re.compile(r"([a-z_]+(?:\.[a-z_]+)?)[^: ]*: ")
_NAMES = {
    "model": "base_model",
    "prompt_token_ids": "prompt",
    "idempotency_key": "X-Idempotency-Key",
    "note": "target_prompt_logprobs",
    "sampling.max_tokens": "sampling_params.max_tokens",
    "sampling.temperature": "sampling_params.temperature",
    "sampling.top_p": "sampling_params.top_p",
    "sampling.stop_token_ids": "sampling_params.stop",
    "sampling.stop_strings": "sampling_params.stop",
    "sampling.top_logprobs": "topk_sample_logprobs",
    "prompt_scoring.top_logprobs": "topk_prompt_logprobs",
    "prompt_scoring.num_alternatives": "prompt_alt_tokens_k",
    "prompt_scoring.target_offsets": "target_prompt_logprobs",
    "prompt_scoring.target_token_ids": "target_prompt_logprobs",
}


def in_clients_words(error: HeadwayError) -> HeadwayError:
    """What is not about a parameter of theirs stays as it is."""
    found = _BEGINNING.match(error.message)
    name = _NAMES.get(found[1]) if found is not None else None
    if found is None or name is None or error.reason is not Reason.INVALID_REQUEST:
        return error
    message = f"{name}: {error.message[found.end() :]}"
    return HeadwayError(error.reason, message, field=name)
