"""A prompt told before its completion: its text, its tokens, and what the model thinks of them."""

import asyncio
import math
from collections.abc import Sequence

from gateway_http.model_text import Text
from gateway_http.openai_output import Echo
from headway.v1 import generation_pb2

_TOKENS_AT_ONCE = 256  # then other requests have their turn


async def make_echo(
    text: Text, prompt: str | Sequence[int], token_ids: Sequence[int], wants_logprobs: bool
) -> Echo:
    """The prompt's text; with logprobs also where each of its tokens begins."""
    if isinstance(prompt, str) and not wants_logprobs:
        return Echo(prompt)
    echo = Echo("")
    if text.has_tokenizer:
        await _detokenize(text, token_ids, echo)
    else:
        echo.text_offsets = [0] * len(token_ids)
    if isinstance(prompt, str):
        echo.text = prompt
    if wants_logprobs:
        echo.token_ids = list(token_ids)
        echo.logprobs = [math.nan] * len(token_ids)
    else:
        echo.text_offsets = []
    return echo


async def _detokenize(text: Text, token_ids: Sequence[int], echo: Echo) -> None:
    detokenizer = text.detokenizer(())
    pieces: list[str] = []
    num_chars = 0
    for number, token_id in enumerate(token_ids, 1):
        echo.text_offsets.append(num_chars)
        pieces.append(detokenizer.push(token_id))
        num_chars += len(pieces[-1])
        if number % _TOKENS_AT_ONCE == 0:
            await asyncio.sleep(0)
    pieces.append(detokenizer.flush())
    echo.text = "".join(pieces)


def add_scores(echo: Echo, scores: generation_pb2.PromptScores) -> None:
    """What the model thinks of it has come."""
    if len(scores.logprob) == len(echo.token_ids):
        echo.logprobs = list(scores.logprob)
        echo.top_token_ids = list(scores.top_token_id)
        echo.top_logprobs = list(scores.top_logprob)
