"""Scores of prompts: how large they are, and whether an executor's answer fits the question.

Rule: the layout is generation.proto's. A row belongs to one prompt token; the first token of a
prompt has none, and of the others only the last ``last_n`` have one, if that is set.
"""

import math
from collections.abc import Sequence

from headway.v1 import generation_pb2 as generation


def num_rows(scoring: generation.PromptScoring, num_prompt_tokens: int) -> int:
    """Prompt tokens that get logprobs and top_logprobs."""
    most = num_prompt_tokens - 1
    return min(most, scoring.last_n) if scoring.last_n else most


def num_expected(scoring: generation.PromptScoring, num_prompt_tokens: int) -> int:
    """How many logprobs the answer holds, of all kinds."""
    return (
        (num_prompt_tokens if scoring.logprobs else 0)
        + num_rows(scoring, num_prompt_tokens) * scoring.top_logprobs
        + len(scoring.target_token_ids)
        + (num_prompt_tokens - 1) * scoring.num_alternatives
    )


def num_entries(scores: generation.PromptScores) -> int:
    """How much scores weigh in a frame, where a token weighs 1."""
    return (
        len(scores.logprob)
        + len(scores.top_token_id)
        + len(scores.target_logprob)
        + len(scores.alternative_token_id)
    )


def find_fault(
    scores: generation.PromptScores,
    scoring: generation.PromptScoring,
    *,
    num_prompt_tokens: int,
    vocab_size: int,
) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    rows = num_rows(scoring, num_prompt_tokens)
    num_blank = num_prompt_tokens - rows
    if len(scores.logprob) != (num_prompt_tokens if scoring.logprobs else 0):
        return "logprob does not match the prompt"
    if not all(map(math.isnan, scores.logprob[:num_blank])):
        return "a logprob came that nobody asked for"
    if not are_finite(scores.logprob[num_blank:]):
        return "a logprob is missing or not finite"
    if len(scores.target_logprob) != len(scoring.target_token_ids):
        return "target_logprob does not match the targets"
    if not are_finite(scores.target_logprob):
        return "a target's logprob is not finite"
    num_alternatives = (num_prompt_tokens - 1) * scoring.num_alternatives
    for name, token_ids, logprobs, num in (
        ("top", scores.top_token_id, scores.top_logprob, rows * scoring.top_logprobs),
        (
            "alternative",
            scores.alternative_token_id,
            scores.alternative_logprob,
            num_alternatives,
        ),
    ):
        if not len(token_ids) == len(logprobs) == num:
            return f"the {name} tokens are not as many as were asked for"
        if not are_alternatives(token_ids, logprobs, vocab_size):
            return f"a {name} token is not in the vocabulary, or its logprob is not finite"
    return None


def are_alternatives(token_ids: Sequence[int], logprobs: Sequence[float], vocab_size: int) -> bool:
    """Whether all are tokens of the vocabulary with a logprob."""
    return max(token_ids, default=0) < vocab_size and are_finite(logprobs)


def are_finite(values: Sequence[float]) -> bool:
    """Of float32: their sum, as a double, cannot overflow, and keeps what is not finite."""
    return math.isfinite(sum(values))
