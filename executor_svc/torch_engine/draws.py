"""From logits over probabilities to tokens: temperature, cuts, draws, lists of the likeliest.

Rule: a draw is a pure function of probabilities, parameters and a place in a random stream. There
is no generator with a state. The uniform number comes from Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) and picks a token by inverse CDF in the
order of token ids, in float64.

Layout of the random numbers: the key is the request's seed, low word and high word. The counter is
four words, of which the third names the stream and the last one is 0:
  (number of the token, number of the sample, SAMPLES, 0) draws a token of a sample;
  (position in the prompt, number of the alternative, ALTERNATIVES, 0) draws a prompt's alternative.

Cuts, in this order: top-k; top-p of what top-k left; min-p relative to the likeliest token. Each
keeps the tokens above a threshold probability, hence all tokens that tie with the last one.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

SAMPLES, ALTERNATIVES = 0, 1

_BLOCK = 64  # tokens
_NUCLEUS_WIDTH = 256  # holds the nucleus of most rows
_MASK = 0xFFFFFFFF
_ROUND_FACTORS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_TEMPERATURES = (1e-30, 1e38)  # float32 has to divide by them


def temperatures(values: Sequence[float]) -> np.ndarray:
    """What to divide logits by, float32 [rows, 1]; greedy rows, at 0, are looked at as if at 1."""
    least, most = _TEMPERATURES
    divisors = [min(max(value, least), most) if value > 0 else 1.0 for value in values]
    return np.array(divisors, dtype=np.float32)[:, None]


def scaled(logits: Tensor, temperature: Tensor) -> Tensor:  # [rows, vocab], [rows, 1]
    """Logits at a temperature; the largest of each row becomes 0."""
    # Taking the maximum off first keeps tiny temperatures from overflowing. In place, because for
    # tensors of this size memory that is new costs 20 times what the arithmetic does.
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature)


class Cuts:
    """top_k, top_p and min_p of some rows. Kept on the host, where looking at them is free."""

    def __init__(self, rows: Sequence[tuple[int, float, float]]) -> None:
        values = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
        # No vocabulary is as large as that, and an int64 holds it.
        self.top_k = values[:, 0].clamp(max=_MASK).long()
        self.top_p = values[:, 1]
        self.min_p = values[:, 2].float()

    def apply(self, probs: Tensor) -> Tensor:  # [rows, vocab]
        """The probabilities, which need not be normalised, with 0 for what is cut."""
        vocab, device = probs.shape[1], probs.device
        cuts_k, cuts_p = (self.top_k > 0) & (self.top_k < vocab), self.top_p < 1
        if not bool((cuts_k | cuts_p | (self.min_p > 0)).any()):
            return probs
        width = int(self.top_k.where(cuts_k, 1).max())
        largest = probs.topk(width, dim=-1).values
        last_k = largest.gather(1, (self.top_k.clamp(1, width) - 1)[:, None].to(device))
        # A row without a top-k cut may see only part of its vocabulary in ``largest``.
        threshold = last_k.where(cuts_k[:, None].to(device), 0.0)
        for is_in, candidates in ((cuts_p & cuts_k, largest), (cuts_p & ~cuts_k, probs)):
            if bool(is_in.any()):
                rows, top_p = torch.nonzero(is_in)[:, 0].to(device), self.top_p[is_in].to(device)
                kept = probs[rows]
                total = cumulative_mass(kept.where(kept >= threshold[rows], 0.0))[:, -1]
                last_p = _last_of_nucleus(candidates[rows], top_p * total)
                threshold[rows] = torch.maximum(threshold[rows], last_p)
        threshold = torch.maximum(threshold, self.min_p[:, None].to(device) * largest[:, :1])
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


def cumulative_mass(probs: Tensor) -> Tensor:  # [rows, vocab]
    """The sum of each row up to the end of each block of 64 tokens, float64 [rows, blocks].

    The last column is the sum of the row. Summing blocks first is some times faster than a running
    sum of all tokens, and sums of 64 are never split among threads, so their bits do not depend
    on the number of rows.
    """
    whole = probs.shape[1] // _BLOCK * _BLOCK
    blocks = probs[:, :whole].unflatten(1, (-1, _BLOCK))
    if probs.is_cuda:
        sums = blocks.sum(-1, dtype=torch.float64)
    else:
        # torch widens what it sums, here to 1.2 MB for each row of 150,000 tokens: of many rows at
        # once that is memory fresh from the system each time, which took a quarter of a step.
        sums = torch.stack([row.sum(-1, dtype=torch.float64) for row in blocks])
    if whole < probs.shape[1]:
        tail = probs[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
        sums = torch.cat([sums, tail], dim=1)
    return sums.cumsum(-1)


def pick(probs: Tensor, mass: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [rows, draws], first the block and then the token in it.

    ``probs`` [rows, vocab] need not be normalised, ``mass`` is their ``cumulative_mass``, and
    ``uniform`` [rows, draws] the random numbers.
    """
    wanted = uniform * mass[:, -1:]
    # Only NaN can lead past the end; the row is reported as bad then.
    block = torch.searchsorted(mass, wanted, right=True).clamp_(max=mass.shape[1] - 1)
    wanted -= F.pad(mass, (1, 0)).gather(1, block)
    token_ids = block[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    is_token = token_ids < probs.shape[1]
    token_ids.clamp_(max=probs.shape[1] - 1)
    inside = probs.gather(1, token_ids.flatten(1)).view_as(token_ids) * is_token
    inside = inside.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(inside, wanted[:, :, None], right=True)
    # Where rounding leads past the block's end, its last token that can be drawn is meant.
    last = torch.searchsorted(inside, inside[:, :, -1:].contiguous())
    place = torch.minimum(place, last).clamp_(max=_BLOCK - 1)  # NaN again
    return token_ids.gather(2, place)[:, :, 0]


def top_tokens(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:  # float32 [rows, vocab]
    """Ids and logprobs, each [rows, count], of the likeliest tokens; ties by token id."""
    if logprobs.is_cuda:
        return top_tokens_by_keys(logprobs, count)
    values, ids = logprobs.topk(count, dim=-1)
    # topk may leave any of the tokens out that tie with the last one: ask for all of these.
    num_candidates = int((logprobs >= values[:, -1:]).sum(-1).max())
    if num_candidates > count:
        values, ids = logprobs.topk(num_candidates, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, by_value = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, by_value)[:, :count], values[:, :count]


def top_tokens_by_keys(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same without a look at the result on the host, for which a GPU would have to be done.

    No two tokens tie if the id is made a part of what is compared: a whole number of 64 bits that
    has the logprob above and the id below, the first ids highest.
    """
    bits = (logprobs + 0.0).view(torch.int32)  # of two zeros, which are equal, there is one left
    # Floats are ordered as their bits are, and negative ones the other way round.
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = logprobs.shape[1] - 1
    keys = (order << 32) + torch.arange(last, -1, -1, device=logprobs.device)
    ids = last - (keys.topk(count, dim=-1).values & _MASK)
    return ids, logprobs.gather(1, ids)


def seed_words(seed: int) -> tuple[int, int]:
    """Low and high word of a seed."""
    return seed & _MASK, seed >> 32 & _MASK


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
