"""Draws for a whole step at once, without a word to the host: each program has one row.

They compute what ``draws.py`` defines, by other means, since sorting a vocabulary or looking at a
result on the host is what a GPU is slow at. Sums are float64 in an order that only the vocabulary's
size fixes, so a row does not depend on its company; they may differ from the definition's by the
last bit or two, which moves a draw once in some 10^13.

Thresholds: positive floats are ordered as their bits are. So the least probability of the likeliest
k tokens, or of the tokens that together reach top_p, is found bit by bit: it is the largest
threshold with so many tokens, or so much mass, at or above it. Each pass over the row looks at 8
thresholds, which settles 3 of the 30 bits that a number below 2 has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.torch_engine.draws import SAMPLES
from executor_svc.torch_engine.wishes import (
    INDEX,
    IS_DRAWN,
    MIN_P,
    NUM_FLOATS,
    NUM_INTS,
    SAMPLE,
    SEED,
    TOP_K,
    TOP_P,
    Wishes,
)

TILE = 1024  # tokens
NUM_WARPS = 8

_IS_DRAWN, _SEED, _INDEX = tl.constexpr(IS_DRAWN), tl.constexpr(SEED), tl.constexpr(INDEX)
_SAMPLE, _TOP_K = tl.constexpr(SAMPLE), tl.constexpr(TOP_K)
_TOP_P, _MIN_P = tl.constexpr(TOP_P), tl.constexpr(MIN_P)
_NUM_INTS, _NUM_FLOATS = tl.constexpr(NUM_INTS), tl.constexpr(NUM_FLOATS)
_SAMPLES = tl.constexpr(SAMPLES)
_THRESHOLDS = tl.constexpr(8)
_HIGHEST_STEP = tl.constexpr(1 << 27)  # 8 of them are the bits of 2.0
_NUM_PASSES = tl.constexpr(10)


@triton.jit
def _measures(probs, least, VOCAB, TILE: tl.constexpr, COUNTS: tl.constexpr):
    """The mass of a row's tokens at or above each threshold, or their number; float64."""
    measures = tl.zeros(least.shape, tl.float64)
    for start in range(0, VOCAB, TILE):
        tokens = start + tl.arange(0, TILE)
        values = tl.load(probs + tokens, mask=tokens < VOCAB, other=-1.0)
        weights = tl.full([TILE], 1.0, tl.float64) if COUNTS else values.to(tl.float64)
        is_in = values[None, :] >= least[:, None]
        measures += tl.sum(tl.where(is_in, weights[None, :], 0.0), 1)
    return measures


@triton.jit
def _mass(probs, least, VOCAB, TILE: tl.constexpr):
    """The mass of a row's tokens at or above one threshold."""
    mass = tl.zeros([], tl.float64)
    for start in range(0, VOCAB, TILE):
        tokens = start + tl.arange(0, TILE)
        values = tl.load(probs + tokens, mask=tokens < VOCAB, other=0.0)
        mass += tl.sum(tl.where(values >= least, values, 0.0).to(tl.float64), 0)
    return mass


@triton.jit
def _threshold(probs, wanted, VOCAB, TILE: tl.constexpr, COUNTS: tl.constexpr):
    """The largest threshold with so much at or above it: the probability of the last token in."""
    low = tl.zeros([], tl.int32)
    step = tl.full([], _HIGHEST_STEP, tl.int32)
    for _ in range(_NUM_PASSES):
        candidates = low + step * tl.arange(0, _THRESHOLDS)
        measures = _measures(probs, candidates.to(tl.float32, bitcast=True), VOCAB, TILE, COUNTS)
        num_reached = tl.sum((measures >= wanted).to(tl.int32), 0)
        low += step * tl.maximum(num_reached - 1, 0)  # not even the lowest one for a row of NaN
        step = step // _THRESHOLDS
    return low.to(tl.float32, bitcast=True)


@triton.jit
def _uniform(seed, index, sample):
    """See ``draws.uniforms``; Triton's own Philox is the same one."""
    high, low, _, _ = tl.philox(
        seed.to(tl.uint64, bitcast=True),
        index.to(tl.int32),
        sample.to(tl.int32),
        tl.full([], _SAMPLES, tl.int32),
        tl.full([], 0, tl.int32),
    )
    bits = ((high >> 5).to(tl.int64) << 26) + (low >> 6).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _pick(probs, wanted, least, VOCAB, TILE: tl.constexpr):
    """The first token with a running mass above ``wanted``; rounding may leave only the last."""
    picked = tl.full([], VOCAB, tl.int32)
    last = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for start in range(0, VOCAB, TILE):
        tokens = start + tl.arange(0, TILE)
        values = tl.load(probs + tokens, mask=tokens < VOCAB, other=0.0)
        is_in = (values >= least) & (values > 0)
        running = mass + tl.cumsum(tl.where(is_in, values, 0.0).to(tl.float64), 0)
        picked = tl.minimum(picked, tl.min(tl.where(is_in & (running > wanted), tokens, VOCAB), 0))
        last = tl.maximum(last, tl.max(tl.where(is_in, tokens, 0), 0))
        mass = tl.max(running, 0)
    return tl.where(picked < VOCAB, picked, last)


@triton.jit
def _draw_kernel(
    out,  # [rows]
    probs,  # [rows, VOCAB]; the greatest of a row is 1
    ints,  # see wishes.py; floats likewise
    floats,
    VOCAB,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    probs += row * VOCAB
    ints += row * _NUM_INTS
    floats += row * _NUM_FLOATS
    token = tl.zeros([], tl.int32)
    if tl.load(ints + _IS_DRAWN) != 0:
        least = tl.load(floats + _MIN_P).to(tl.float32)
        top_k, top_p = tl.load(ints + _TOP_K), tl.load(floats + _TOP_P)
        least_of_k = tl.zeros([], tl.float32)
        if (top_k > 0) & (top_k < VOCAB):
            least_of_k = _threshold(probs, top_k.to(tl.float64), VOCAB, TILE, True)
            least = tl.maximum(least, least_of_k)
        if top_p < 1:
            wanted = top_p * _mass(probs, least_of_k, VOCAB, TILE)
            least = tl.maximum(least, _threshold(probs, wanted, VOCAB, TILE, False))
        uniform = _uniform(tl.load(ints + _SEED), tl.load(ints + _INDEX), tl.load(ints + _SAMPLE))
        wanted = uniform * _mass(probs, least, VOCAB, TILE)
        token = _pick(probs, wanted, least, VOCAB, TILE)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _total_kernel(out, probs, VOCAB, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    mass = tl.zeros([], tl.float64)
    for start in range(0, VOCAB, TILE):
        tokens = start + tl.arange(0, TILE)
        values = tl.load(probs + row * VOCAB + tokens, mask=tokens < VOCAB, other=0.0)
        mass += tl.sum(values.to(tl.float64), 0)
    tl.store(out + row, mass)


def draw(probs: Tensor, wishes: Wishes) -> Tensor:
    """A token for each row that is drawn, int64 [rows]; 0 for the greedy ones.

    ``probs`` [rows, vocab] need not be normalised, but the greatest of each row is 1.
    """
    assert probs.is_contiguous()
    assert wishes.ints.is_contiguous()
    assert wishes.floats.is_contiguous()
    num_rows, vocab = probs.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=probs.device)
    _draw_kernel[(num_rows,)](out, probs, *wishes, VOCAB=vocab, TILE=TILE, num_warps=NUM_WARPS)
    return out


def totals(probs: Tensor) -> Tensor:  # [rows, vocab]
    """The sum of each row, float64 [rows, 1]; NaN where one of its numbers is."""
    assert probs.is_contiguous()
    num_rows, vocab = probs.shape
    out = torch.empty(num_rows, 1, dtype=torch.float64, device=probs.device)
    _total_kernel[(num_rows,)](out, probs, VOCAB=vocab, TILE=TILE, num_warps=NUM_WARPS)
    return out
