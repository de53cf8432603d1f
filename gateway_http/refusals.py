"""Refusals of scheduler and executors, by the names that clients gave their parameters.

A refusal begins with the place of what is wrong in a GenerationRequest, such as
"sampling.stop_strings[2]: " (``checks.bad``); executors leave out the "sampling.". Each kind of
client has its table from places to its own names; what is not about one of those stays as it is.
"""

import re
from collections.abc import Mapping

from headway.errors import HeadwayError
from headway.reasons import Reason

_PLACE = re.compile(r"([a-z_]+(?:\.[a-z_]+)?)[^: ]*: ")

OPENAI = {
    "band": "priority",
    "num_samples": "n",
    "session_id": "session_id",
    "idempotency_key": "Idempotency-Key",
    "next_index": "x-headway-resume",
    "sampling.max_tokens": "max_tokens",
    "sampling.stop_strings": "stop",
    "sampling.stop_token_ids": "stop_token_ids",
    "sampling.logit_bias": "logit_bias",
    "sampling.top_logprobs": "top_logprobs",
}
TINKER = {
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

# in a sampling session numbers stand for keys
NUMBERED = {**TINKER, "idempotency_key": "seq_id"}


def openai_names(grammar_field: str) -> Mapping[str, str]:
    """``grammar_field``: the parameter that asks for this request's grammar, if one does."""
    if not grammar_field:
        return OPENAI
    return {**OPENAI, "sampling.grammar": grammar_field}


def in_clients_words(error: HeadwayError, names: Mapping[str, str]) -> HeadwayError:
    """The same refusal, about what its client knows."""
    if error.reason is Reason.REQUEST_ID_CONFLICT:
        key = names["idempotency_key"]
        message = f"{key}: it came with another request before; a new one needs a new {key}."
        return HeadwayError(error.reason, message, field=key)
    found = _PLACE.match(error.message)
    if error.reason is not Reason.INVALID_REQUEST or found is None:
        return error
    name = names.get(found[1]) or names.get(f"sampling.{found[1]}")
    if name is None:
        return error
    return HeadwayError(error.reason, f"{name}: {error.message[found.end() :]}", field=name)
