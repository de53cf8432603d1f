"""Draws for a whole step at once, without a word to the host.

They compute what ``draws.py`` defines, by other means, since sorting a vocabulary or looking at a
result on the host is what a GPU is slow at. Sums are float64 in an order that only the vocabulary's
size fixes, so a row does not depend on its company; they may differ from the definition's by the
last bit or two, which moves a draw once in some 10^13.

One row is too little work for a GPU if one program has it all, so a vocabulary has parts:

1. *survey*: how many tokens of each part reach each of 16 levels of probability, and their mass;
2. *gather*: of a row with cuts, the tokens that reach the highest level which none of its cuts is
   above, in the order of their ids. They are few, unless a row is flat and its cuts are wide;
3. *draw*: the cuts are looked for among these alone. A row without cuts has its token looked for in
   the one part that the survey points to.

Thresholds: positive floats are ordered as their bits are. So the least probability of the likeliest
k tokens, or of the tokens that together reach top_p, is found bit by bit: it is the largest
threshold with so many tokens, or so much mass, at or above it. Each pass over the tokens looks at 8
thresholds, which settles 3 of the 30 bits that a number below 2 has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.torch_engine.draws import SAMPLES
from executor_svc.torch_engine.kernels.survey import (
    INDEX,
    IS_DRAWN,
    LAST_LEVEL,
    MIN_P,
    NUM_FLOATS,
    NUM_INTS,
    NUM_LEVELS,
    SAMPLE,
    SEED,
    TOP_K,
    TOP_P,
    gather_kernel,
    level_of,
    of_parts,
    survey_kernel,
)
from executor_svc.torch_engine.wishes import Wishes

PART = 4096  # tokens; of each row and part there is one program
TILE = 1024  # of the tokens that are looked at together when a row has one program
NUM_WARPS = 8

_SAMPLES = tl.constexpr(SAMPLES)
_THRESHOLDS = tl.constexpr(8)
_HIGHEST_STEP = tl.constexpr(1 << 27)  # 8 of them are the bits of 2.0
_NUM_PASSES = tl.constexpr(10)
_NO_PLACE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _gathered(probs, ids, places, length):
    """Probabilities of some of a row's gathered tokens, -1 past the last one."""
    tokens = tl.load(ids + places, mask=places < length, other=0)
    return tl.load(probs + tokens, mask=places < length, other=-1.0)


@triton.jit
def _measures(probs, ids, least, length, TILE: tl.constexpr, COUNTS: tl.constexpr):
    """The mass of gathered tokens at or above each threshold, or their number; float64."""
    measures = tl.zeros(least.shape, tl.float64)
    for start in range(0, length, TILE):
        values = _gathered(probs, ids, start + tl.arange(0, TILE), length)
        weights = tl.full([TILE], 1.0, tl.float64) if COUNTS else values.to(tl.float64)
        is_in = values[None, :] >= least[:, None]
        measures += tl.sum(tl.where(is_in, weights[None, :], 0.0), 1)
    return measures


@triton.jit
def _mass(probs, ids, least, length, TILE: tl.constexpr):
    """The mass of gathered tokens at or above one threshold."""
    mass = tl.zeros([], tl.float64)
    for start in range(0, length, TILE):
        values = _gathered(probs, ids, start + tl.arange(0, TILE), length)
        mass += tl.sum(tl.where((values >= least) & (values > 0), values, 0.0).to(tl.float64), 0)
    return mass


@triton.jit
def _threshold(probs, ids, wanted, length, TILE: tl.constexpr, COUNTS: tl.constexpr):
    """The largest threshold with so much at or above it: the probability of the last token in."""
    low = tl.zeros([], tl.int32)
    step = tl.full([], _HIGHEST_STEP, tl.int32)
    for _ in range(_NUM_PASSES):
        candidates = low + step * tl.arange(0, _THRESHOLDS)
        least = candidates.to(tl.float32, bitcast=True)
        measures = _measures(probs, ids, least, length, TILE, COUNTS)
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
def _place(values, places, mass, wanted):
    """Where a running mass that begins with ``mass`` comes above ``wanted``, if it does.

    Gives that place or a great number, the last place that can be drawn or -1, and the mass behind.
    """
    is_in = values > 0
    running = mass + tl.cumsum(tl.where(is_in, values, 0.0).to(tl.float64), 0)
    place = tl.min(tl.where(is_in & (running > wanted), places, _NO_PLACE), 0)
    return place, tl.max(tl.where(is_in, places, -1), 0), tl.max(running, 0)


@triton.jit
def _pick(probs, ids, wanted, least, length, TILE: tl.constexpr):
    """The first gathered token with a running mass above ``wanted``.

    Rounding may leave only the last one.
    """
    place = tl.full([], _NO_PLACE, tl.int32)
    last = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for start in range(0, length, TILE):
        places = start + tl.arange(0, TILE)
        values = _gathered(probs, ids, places, length)
        values = tl.where(values >= least, values, 0.0)
        here, last_here, mass = _place(values, places, mass, wanted)
        place, last = tl.minimum(place, here), tl.maximum(last, last_here)
    return tl.load(ids + tl.minimum(place, last), mask=length > 0, other=0)


@triton.jit
def _draw_cut(probs, ids, ints, floats, uniform, mass, length, VOCAB, TILE: tl.constexpr):
    """The token of a row that has cuts; all but the last two arguments are its own."""
    top_k, top_p = tl.load(ints + TOP_K), tl.load(floats + TOP_P)
    least = tl.load(floats + MIN_P).to(tl.float32)
    if (top_k > 0) & (top_k < VOCAB):
        least_of_k = _threshold(probs, ids, top_k.to(tl.float64), length, TILE, True)
        mass = _mass(probs, ids, least_of_k, length, TILE)
        least = tl.maximum(least, least_of_k)
    if top_p < 1:
        least = tl.maximum(least, _threshold(probs, ids, top_p * mass, length, TILE, False))
    wanted = uniform * _mass(probs, ids, least, length, TILE)
    return _pick(probs, ids, wanted, least, length, TILE)


@triton.jit
def _draw_whole(
    probs, masses, uniform, row, num_parts, VOCAB, PART: tl.constexpr, PADDED: tl.constexpr
):
    """The token of a row without cuts; probs are its own."""
    mass = of_parts(masses, row, LAST_LEVEL, num_parts, PADDED)
    parts = tl.arange(0, PADDED)
    ends = tl.cumsum(mass, 0)
    wanted = uniform * tl.max(ends, 0)
    # Rounding may leave only the last part.
    last_part = tl.max(tl.where(mass > 0, parts, 0), 0)
    part = tl.minimum(tl.sum((ends <= wanted).to(tl.int32), 0), last_part)
    before = tl.sum(tl.where(parts < part, mass, 0.0), 0)
    tokens = part * PART + tl.arange(0, PART)
    values = tl.load(probs + tokens, mask=tokens < VOCAB, other=0.0)
    token, last, _ = _place(values, tokens, before, wanted)
    return tl.maximum(tl.minimum(token, last), 0)


@triton.jit
def _draw_kernel(
    out,  # [rows]
    probs,  # as above
    ids,
    counts,
    masses,
    ints,
    floats,
    num_parts,
    VOCAB,
    PART: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    probs += row * VOCAB
    ids += row * VOCAB
    ints += row * NUM_INTS
    floats += row * NUM_FLOATS
    token = tl.zeros([], tl.int32)
    if tl.load(ints + IS_DRAWN) != 0:
        uniform = _uniform(tl.load(ints + SEED), tl.load(ints + INDEX), tl.load(ints + SAMPLE))
        level = level_of(counts, masses, ints, floats, row, num_parts, VOCAB, PADDED)
        if level >= 0:
            length = tl.sum(of_parts(counts, row, level, num_parts, PADDED), 0)
            mass = tl.sum(of_parts(masses, row, LAST_LEVEL, num_parts, PADDED), 0)
            token = _draw_cut(probs, ids, ints, floats, uniform, mass, length, VOCAB, TILE)
        else:
            token = _draw_whole(probs, masses, uniform, row, num_parts, VOCAB, PART, PADDED)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _part_sum_kernel(sums, probs, VOCAB, PART: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = part * PART + tl.arange(0, PART)
    values = tl.load(probs + row * VOCAB + tokens, mask=tokens < VOCAB, other=0.0)
    tl.store(sums + row * tl.num_programs(1) + part, tl.sum(values.to(tl.float64), 0))


@triton.jit
def _total_kernel(out, sums, num_parts, PADDED: tl.constexpr):
    row, parts = tl.program_id(0), tl.arange(0, PADDED)
    mass = tl.load(sums + row * num_parts + parts, mask=parts < num_parts, other=0.0)
    tl.store(out + row, tl.sum(mass, 0))


def draw(probs: Tensor, wishes: Wishes) -> Tensor:
    """A token for each row that is drawn, int64 [rows]; 0 for the greedy ones.

    ``probs`` [rows, vocab] need not be normalised, but the greatest of each row is 1.
    """
    assert probs.is_contiguous()
    assert wishes.ints.is_contiguous()
    assert wishes.floats.is_contiguous()
    (num_rows, vocab), device = probs.shape, probs.device
    num_parts = triton.cdiv(vocab, PART)
    sizes = {"PART": PART, "PADDED": triton.next_power_of_2(num_parts), "TILE": TILE}
    counts = torch.empty(num_rows, num_parts, NUM_LEVELS.value, dtype=torch.int32, device=device)
    masses = torch.empty(counts.shape, dtype=torch.float64, device=device)
    ids = torch.empty(probs.shape, dtype=torch.int32, device=device)
    out = torch.empty(num_rows, dtype=torch.int64, device=device)
    by_part = (num_rows, num_parts)
    survey_kernel[by_part](
        counts, masses, probs, wishes.ints, VOCAB=vocab, PART=PART, num_warps=NUM_WARPS
    )
    seen = (probs, counts, masses)
    gather_kernel[by_part](ids, *seen, *wishes, VOCAB=vocab, **sizes, num_warps=NUM_WARPS)
    _draw_kernel[(num_rows,)](
        *(out, probs, ids, counts, masses, *wishes, num_parts),
        VOCAB=vocab,
        **sizes,
        num_warps=NUM_WARPS,
    )
    return out


def totals(probs: Tensor) -> Tensor:  # [rows, vocab]
    """The sum of each row, float64 [rows, 1]; NaN where one of its numbers is."""
    assert probs.is_contiguous()
    num_rows, vocab = probs.shape
    num_parts = triton.cdiv(vocab, PART)
    sums = torch.empty(num_rows, num_parts, dtype=torch.float64, device=probs.device)
    out = torch.empty(num_rows, 1, dtype=torch.float64, device=probs.device)
    _part_sum_kernel[(num_rows, num_parts)](sums, probs, VOCAB=vocab, PART=PART, num_warps=4)
    _total_kernel[(num_rows,)](
        out, sums, num_parts, PADDED=triton.next_power_of_2(num_parts), num_warps=1
    )
    return out
