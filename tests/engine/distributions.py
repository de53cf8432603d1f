"""What a draw should be, by plain Python, and whether draws are that."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import torch

from executor_svc.core.engine import SamplingParams

VOCAB = 40


def expected(logits: torch.Tensor, params: SamplingParams) -> list[float]:
    """The probability of each token: sort, cut, normalise."""
    probs = torch.softmax(logits.double() / params.temperature, -1).tolist()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    total = sum(probs[token] for token in ranked)
    sums = itertools.accumulate((probs[token] for token in ranked), initial=0.0)
    ranked = [t for t, mass in zip(ranked, sums, strict=False) if mass < params.top_p * total]
    kept = {t for t in ranked if probs[t] >= params.min_p * probs[ranked[0]]}
    total = sum(probs[token] for token in kept)
    return [prob / total if token in kept else 0.0 for token, prob in enumerate(probs)]


def assert_drawn_from(probs: Sequence[float], token_ids: Sequence[int]) -> None:
    """Each token comes as often as it should, within four and a half standard deviations."""
    count, counts = len(token_ids), Counter(token_ids)
    for token, prob in enumerate(probs):
        spread = math.sqrt(count * prob * (1 - prob))
        assert abs(counts[token] - count * prob) <= 4.5 * spread + 1e-6, (token, prob)
