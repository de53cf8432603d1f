"""Logits to tokens, a whole step at once.

Rule: a draw is a pure function of the row's logits, its parameters and (seed, sample, index).
There is no generator with a state, so a preempted, resumed or moved sequence goes on unchanged.
The uniform number comes from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) and picks a token by inverse CDF in the order of token ids, in float64.

Cuts, in this order: top-k; top-p of what top-k left; min-p relative to the likeliest token. Each
keeps the tokens above a threshold probability, hence all tokens that tie with the last one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from executor_svc.core.engine import SamplingParams

_NUCLEUS_WIDTH = 256  # holds the nucleus of most rows
_MASK = 0xFFFFFFFF
_ROUND_FACTORS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, slots=True)
class RowParams:
    """The constant part of a row, in the order in which ``SamplingBatch`` packs it."""

    cuts: tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
    stream: tuple[int, int, int]  # seed, low and high word; sample
    min_tokens: int
    banned_until_then: tuple[int, ...]  # stop tokens

    @staticmethod
    def of(params: SamplingParams, sample: int, stop_token_ids: Iterable[int]) -> "RowParams":
        return RowParams(
            cuts=(params.temperature, min(params.top_k, _MASK), params.top_p, params.min_p),
            stream=(params.seed & _MASK, params.seed >> 32 & _MASK, sample),
            min_tokens=params.min_tokens,
            banned_until_then=tuple(sorted(stop_token_ids)) if params.min_tokens else (),
        )


class SamplingBatch:
    """Parameters of a step's rows as tensors; ``indices[i]`` is the number of row i's token."""

    def __init__(
        self, rows: Sequence[RowParams], indices: Sequence[int], device: torch.device
    ) -> None:
        cuts = torch.tensor([row.cuts for row in rows], dtype=torch.float64)
        streams = torch.tensor([row.stream for row in rows], dtype=torch.int64)
        self.top_k = cuts[:, 1].long().to(device)
        self.top_p = cuts[:, 2].to(device)
        self.min_p = cuts[:, 3].float().to(device)
        self.drawn = torch.nonzero(cuts[:, 0] > 0)[:, 0].to(device)  # rows that are not greedy
        # Greedy rows report their logprob at temperature 1; float32 has no smaller one than this.
        temperature = cuts[:, 0].where(cuts[:, 0] > 0, 1.0).clamp(min=1e-30)
        self.temperature = temperature.float()[:, None].to(device)
        self.key = streams[:, :2].to(device)
        index = torch.tensor(indices, dtype=torch.int64)
        zero = torch.zeros_like(index)
        self.counter = torch.stack([index, streams[:, 2], zero, zero], dim=1).to(device)
        banned = [
            (i, token_id)
            for i, (row, index_) in enumerate(zip(rows, indices, strict=True))
            if index_ < row.min_tokens
            for token_id in row.banned_until_then
        ]
        self.banned = torch.tensor(banned, dtype=torch.int64).view(-1, 2).to(device)


def sample(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:  # [rows, vocab]
    """Token ids [rows] and their logprobs [rows]; a row with bad logits gets a NaN logprob."""
    # Taking the maximum off first keeps tiny temperatures from overflowing.
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / batch.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    scores = logprobs
    if len(batch.banned):
        scores = logprobs.clone()
        scores[batch.banned[:, 0], batch.banned[:, 1]] = -torch.inf
    token_ids = scores.argmax(-1)
    if len(batch.drawn):
        scores = scores[batch.drawn]
        # From the maximum down, so that a ban leaves some mass even if it takes nearly all.
        probs = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        token_ids[batch.drawn] = _draw(probs, batch)
    return token_ids, logprobs.gather(1, token_ids[:, None])[:, 0]


def _draw(probs: Tensor, batch: SamplingBatch) -> Tensor:  # [drawn rows, vocab]
    """One token id for each row that is not greedy."""
    rows = batch.drawn
    probs = _cut(probs, batch.top_k[rows], batch.top_p[rows], batch.min_p[rows])
    cdf = probs.cumsum(-1, dtype=torch.float64)
    uniform = uniforms(batch.counter[rows], batch.key[rows])
    picked = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    # Only NaN can lead past the end; the row is reported as bad then.
    return picked.clamp_(max=probs.shape[1] - 1)


def _cut(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set the probabilities that the cuts remove to 0.

    probs is [rows, vocab] and not normalised; the others are [rows].
    """
    vocab = probs.shape[1]
    cuts_k, cuts_p = (top_k > 0) & (top_k < vocab), top_p < 1
    if not bool((cuts_k | cuts_p | (min_p > 0)).any()):
        return probs
    width = int(top_k.where(cuts_k, 1).max())
    largest = probs.topk(width, dim=-1).values
    last_k = largest.gather(1, (top_k.clamp(1, width) - 1)[:, None])
    # A row without a top-k cut may see only part of its vocabulary in ``largest``.
    threshold = last_k.where(cuts_k[:, None], 0.0)
    for is_in, candidates in ((cuts_p & cuts_k, largest), (cuts_p & ~cuts_k, probs)):
        rows = torch.nonzero(is_in)[:, 0]
        if len(rows):
            kept = probs[rows]
            total = kept.where(kept >= threshold[rows], 0.0).sum(-1, dtype=torch.float64)
            last_p = _last_of_nucleus(candidates[rows], top_p[rows] * total)
            threshold[rows] = torch.maximum(threshold[rows], last_p)
    threshold = torch.maximum(threshold, min_p[:, None] * largest[:, :1])
    return probs.where(probs >= threshold, 0.0)


def _last_of_nucleus(probs: Tensor, wanted: Tensor) -> Tensor:  # [rows, vocab], [rows]
    """The least of the largest probabilities that together reach ``wanted``, [rows, 1].

    Only flat rows need a sort of their whole vocabulary. For the others it would give the same
    bits, since sums run from the largest down.
    """
    last = probs.new_zeros(probs.shape[0], 1)
    rows = torch.arange(probs.shape[0], device=probs.device)
    width = min(_NUCLEUS_WIDTH, probs.shape[1])
    while True:
        largest = probs[rows].topk(width, dim=-1).values
        mass = largest.cumsum(-1, dtype=torch.float64)
        before = F.pad(mass[:, :-1], (1, 0))
        # The first one is in, but for a row of NaN, which must not upset the others.
        num_in = (before < wanted[rows, None]).sum(-1, keepdim=True)
        last[rows] = largest.gather(1, (num_in - 1).clamp_(min=0))
        rows = rows[mass[:, -1] < wanted[rows]]
        if not len(rows) or width == probs.shape[1]:
            return last
        width = min(32 * width, probs.shape[1])


def uniforms(counter: Tensor, key: Tensor) -> Tensor:  # [n, 4], [n, 2] of 32-bit words
    """Numbers in [0, 1) with 53 random bits, float64 [n]."""
    words = philox(counter, key)
    return ((words[:, 0] >> 5 << 26) + (words[:, 1] >> 6)).double() * 2.0**-53


def philox(counter: Tensor, key: Tensor) -> Tensor:  # [n, 4], [n, 2] of 32-bit words in int64
    """Philox4x32-10: four random 32-bit words for each counter and key, int64 [n, 4]."""
    a, b, c, d = counter.unbind(-1)
    low_key, high_key = key.unbind(-1)
    for _ in range(10):
        # int64 products wrap around, which leaves all 64 bits right; only their sign is lost.
        left, right = a * _ROUND_FACTORS[0], c * _ROUND_FACTORS[1]
        a, b, c, d = (
            (right >> 32 & _MASK) ^ b ^ low_key,
            right & _MASK,
            (left >> 32 & _MASK) ^ d ^ high_key,
            left & _MASK,
        )
        low_key, high_key = low_key + _KEY_STEPS[0] & _MASK, high_key + _KEY_STEPS[1] & _MASK
    return torch.stack([a, b, c, d], dim=-1)
