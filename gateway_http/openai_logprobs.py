"""Logprobs as OpenAI's two families of endpoints write them.

Chats name a token by its text and bytes; completions by a text alone, where a part of a character
reads ``bytes:\\xf0\\x9f``. A token of a model without tokenizer is ``token_id:7``.
"""

import math
from collections.abc import Sequence
from typing import Any

from gateway_http.model_text import Text

_LEAST = -9999.0  # for what cannot be at all: JSON has no infinity, and OpenAI says this


def finite(logprob: float) -> float | None:
    """A logprob as JSON can hold it; None where there is none."""
    return None if math.isnan(logprob) else max(logprob, _LEAST)


def token_name(text: Text, token_id: int) -> str:
    """What completions call a token."""
    if not text.has_tokenizer:
        return f"token_id:{token_id}"
    name = text.token_text(token_id)
    if "\ufffd" in name:
        data = text.token_bytes(token_id)
        if data is not None and not _is_text(data):
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return name


def chat_logprobs(
    text: Text,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    top_token_ids: Sequence[int],
    top_logprobs: Sequence[float],
) -> list[dict[str, Any]]:
    """One entry for each token, with its alternatives; tops are flat, as many for each token."""
    num_top = len(top_token_ids) // len(token_ids) if token_ids else 0
    entries = []
    for number, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        row = slice(number * num_top, (number + 1) * num_top)
        entry = _chat_entry(text, token_id, logprob)
        entry["top_logprobs"] = [
            _chat_entry(text, *top)
            for top in zip(top_token_ids[row], top_logprobs[row], strict=True)
        ]
        entries.append(entry)
    return entries


def completion_logprobs(
    text: Text,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    top_token_ids: Sequence[int],
    top_logprobs: Sequence[float],
    text_offsets: Sequence[int],
) -> dict[str, Any]:
    """Parallel lists; the alternatives of a token name the token itself, too.

    A row of alternatives belongs to each of the last tokens that have one: the first token of a
    prompt has none.
    """
    names = [token_name(text, token_id) for token_id in token_ids]
    values = [finite(logprob) for logprob in logprobs]
    tops: list[dict[str, float | None] | None] | None = None
    if top_token_ids:
        num_rows = sum(value is not None for value in values)
        num_top = len(top_token_ids) // num_rows
        tops, at = [], 0
        for name, value in zip(names, values, strict=True):
            if value is None:
                tops.append(None)
                continue
            row = slice(at, at + num_top)
            at += num_top
            alternatives = {
                token_name(text, token_id): finite(logprob)
                for token_id, logprob in zip(top_token_ids[row], top_logprobs[row], strict=True)
            }
            tops.append({**alternatives, name: value})
    return {
        "tokens": names,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": list(text_offsets),
    }


def _chat_entry(text: Text, token_id: int, logprob: float) -> dict[str, Any]:
    if not text.has_tokenizer:
        name, data = f"token_id:{token_id}", None
    else:
        name, data = text.token_text(token_id), text.token_bytes(token_id)
    return {
        "token": name,
        "logprob": finite(logprob),
        "bytes": list(data) if data is not None else None,
    }


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
