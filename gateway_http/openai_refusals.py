"""Refusals of scheduler and executors, by the names that the client gave its parameters.

They begin with the name of a field of GenerationRequest (``checks.bad``), or with "grammar".
"""

import re

from headway.errors import HeadwayError
from headway.reasons import Reason

_BEGINNING = re.compile(r"(?:sampling\.)?(\w+)[^: ]*: ")
_NAMES = {
    "band": "priority",
    "num_samples": "n",
    "max_tokens": "max_tokens",
    "stop_strings": "stop",
    "stop_token_ids": "stop_token_ids",
    "logit_bias": "logit_bias",
    "top_logprobs": "top_logprobs",
    "session_id": "session_id",
    "idempotency_key": "Idempotency-Key",
    "next_index": "x-headway-resume",
}


def in_clients_words(error: HeadwayError, grammar_field: str) -> HeadwayError:
    """``grammar_field``: the parameter that asks for the request's grammar."""
    found = _BEGINNING.match(error.message)
    if error.reason is not Reason.INVALID_REQUEST or found is None:
        return error
    name = grammar_field if found[1] == "grammar" else _NAMES.get(found[1], "")
    if not name:
        return error
    message = f"{name}: {error.message[found.end() :]}"
    return HeadwayError(error.reason, message, field=name)
