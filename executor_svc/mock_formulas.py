"""What a mock engine says, as formulas, so that whoever reads it can tell what is right.

Rule: every number is a pure function of the request and exact in float32. The logprob of token t is
-(t % 1024) / 1024, wherever it stands.
"""

import hashlib
import math
import struct
from collections.abc import Sequence

from executor_svc.core.engine import LeaseRequest, PromptScores, PromptScoring

STRIDE = 0x9E3779B1
PRIME = 2**31 - 1
_PROMPT = (1 << 32) - 1  # in the place of a sample's number: what is drawn at prompt positions


def mock_base(prompt_token_ids: Sequence[int], seed: int, sample: int) -> int:
    """What tells one token stream from all others: 56 bits of a hash."""
    data = struct.pack(f"<{len(prompt_token_ids)}IQI", *prompt_token_ids, seed, sample)
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def mock_tokens(
    prompt_token_ids: Sequence[int],
    *,
    seed: int,
    sample: int,
    start: int,
    stop: int,
    vocab_size: int,
) -> list[int]:
    """Tokens [start, stop) of a sample, before any end.

    The last id of the vocabulary is the end-of-sequence token and is never among them.
    """
    base, num_ids = mock_base(prompt_token_ids, seed, sample), vocab_size - 1
    return [(base ^ index * STRIDE) % PRIME % num_ids for index in range(start, stop)]


def mock_logprob(token_id: int) -> float:
    """Of a token, wherever it stands."""
    return -(token_id % 1024) / 1024


def mock_top(token_id: int, num_top: int, vocab_size: int) -> tuple[list[int], list[float]]:
    """The ids of the alternatives of a token, and their logprobs.

    The token itself is the likeliest; the id after it is the next one and 1/8 less likely.
    """
    token_ids = [(token_id + place) % vocab_size for place in range(num_top)]
    first = mock_logprob(token_id)
    return token_ids, [first - place / 8 for place in range(num_top)]


def mock_scores(request: LeaseRequest, scoring: PromptScoring, vocab_size: int) -> PromptScores:
    """What is said about a prompt; position i after the first has the alternatives
    ``mock_tokens`` (i - 1) * num_alternatives and following of sample 2**32 - 1."""
    prompt = request.prompt_token_ids
    num_rows = len(prompt) - 1
    if scoring.last_n:
        num_rows = min(num_rows, scoring.last_n)
    scored = prompt[len(prompt) - num_rows :]
    scores = PromptScores(request.key)
    if scoring.wants_logprobs:
        blank = [math.nan] * (len(prompt) - num_rows)
        scores.logprob = blank + [mock_logprob(token_id) for token_id in scored]
    tops = [mock_top(token_id, scoring.top_logprobs, vocab_size) for token_id in scored]
    scores.top_token_id = [token_id for token_ids, _ in tops for token_id in token_ids]
    scores.top_logprob = [logprob for _, logprobs in tops for logprob in logprobs]
    scores.target_logprob = [mock_logprob(token_id) for token_id in scoring.target_token_ids]
    scores.alternative_token_id = mock_tokens(
        prompt,
        seed=request.params.seed,
        sample=_PROMPT,
        start=0,
        stop=(len(prompt) - 1) * scoring.num_alternatives,
        vocab_size=vocab_size,
    )
    scores.alternative_logprob = [mock_logprob(t) for t in scores.alternative_token_id]
    return scores
