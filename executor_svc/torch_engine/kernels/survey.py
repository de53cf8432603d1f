"""What is seen of a vocabulary, part by part, before a token is drawn: see sampling.py."""

import triton
import triton.language as tl

from executor_svc.torch_engine import wishes

IS_DRAWN, SEED = tl.constexpr(wishes.IS_DRAWN), tl.constexpr(wishes.SEED)
INDEX, SAMPLE = tl.constexpr(wishes.INDEX), tl.constexpr(wishes.SAMPLE)
TOP_K, TOP_P = tl.constexpr(wishes.TOP_K), tl.constexpr(wishes.TOP_P)
MIN_P = tl.constexpr(wishes.MIN_P)
NUM_INTS, NUM_FLOATS = tl.constexpr(wishes.NUM_INTS), tl.constexpr(wishes.NUM_FLOATS)
NUM_LEVELS, LAST_LEVEL = tl.constexpr(16), tl.constexpr(15)
_SURVEYED = tl.constexpr(256)  # tokens that are compared with all levels at once


@triton.jit
def _levels():
    """1/4, 1/16 and so on, and 0 in the end: float32 [NUM_LEVELS]."""
    numbers = tl.arange(0, NUM_LEVELS)
    return tl.where(numbers < LAST_LEVEL, (125 - 2 * numbers) << 23, 0).to(tl.float32, bitcast=True)


@triton.jit
def survey_kernel(
    counts,  # [rows, parts, NUM_LEVELS]; masses likewise
    masses,
    probs,  # [rows, VOCAB]; the greatest of a row is 1
    ints,
    VOCAB,
    PART: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(ints + row * NUM_INTS + IS_DRAWN) != 0:
        levels = _levels()
        count = tl.zeros([NUM_LEVELS], tl.int32)
        mass = tl.zeros([NUM_LEVELS], tl.float64)
        for start in range(0, PART, _SURVEYED):
            tokens = part * PART + start + tl.arange(0, _SURVEYED)
            values = tl.load(probs + row * VOCAB + tokens, mask=tokens < VOCAB, other=-1.0)
            is_in = values[None, :] >= levels[:, None]
            count += tl.sum(is_in.to(tl.int32), 1)
            mass += tl.sum(tl.where(is_in, values.to(tl.float64)[None, :], 0.0), 1)
        places = (row * tl.num_programs(1) + part) * NUM_LEVELS + tl.arange(0, NUM_LEVELS)
        tl.store(counts + places, count)
        tl.store(masses + places, mass)


@triton.jit
def of_parts(surveyed, row, level, num_parts, PADDED: tl.constexpr):
    """What the survey has of each part at one level, [PADDED]; 0 past the last part."""
    parts = tl.arange(0, PADDED)
    places = (row * num_parts + parts) * NUM_LEVELS + level
    return tl.load(surveyed + places, mask=parts < num_parts, other=0)


@triton.jit
def _of_row(surveyed, row, num_parts, PADDED: tl.constexpr):
    """What the survey has of the whole row at each level, [NUM_LEVELS]."""
    parts = tl.arange(0, PADDED)[:, None]
    places = (row * num_parts + parts) * NUM_LEVELS + tl.arange(0, NUM_LEVELS)[None, :]
    return tl.sum(tl.load(surveyed + places, mask=parts < num_parts, other=0), 0)


@triton.jit
def _first(is_reached):
    """The number of the highest level that is; the last one, if none is."""
    return tl.min(tl.where(is_reached, tl.arange(0, NUM_LEVELS), LAST_LEVEL), 0)


@triton.jit
def level_of(counts, masses, ints, floats, row, num_parts, VOCAB, PADDED: tl.constexpr):
    """The level that the tokens reach among which a row's cuts are; -1 if it has none.

    ``ints`` and ``floats`` are the row's.
    """
    top_k, top_p = tl.load(ints + TOP_K), tl.load(floats + TOP_P)
    min_p = tl.load(floats + MIN_P).to(tl.float32)
    level = tl.full([], -1, tl.int32)
    if (top_k > 0) & (top_k < VOCAB):
        level = _first(_of_row(counts, row, num_parts, PADDED) >= top_k)
    elif top_p < 1:
        mass = _of_row(masses, row, num_parts, PADDED)
        level = _first(mass >= top_p * tl.max(mass, 0))
    elif min_p > 0:
        level = _first(_levels() <= min_p)
    return level


@triton.jit
def gather_kernel(
    ids,  # [rows, VOCAB]
    probs,
    counts,
    masses,
    ints,  # see wishes.py; floats likewise
    floats,
    VOCAB,
    PART: tl.constexpr,
    PADDED: tl.constexpr,  # number of parts
    TILE: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ints += row * NUM_INTS
    floats += row * NUM_FLOATS
    if tl.load(ints + IS_DRAWN) != 0:
        num_parts = tl.num_programs(1)
        level = level_of(counts, masses, ints, floats, row, num_parts, VOCAB, PADDED)
        if level >= 0:
            least = tl.max(tl.where(tl.arange(0, NUM_LEVELS) == level, _levels(), 0.0), 0)
            found = of_parts(counts, row, level, num_parts, PADDED)
            place = tl.sum(tl.where(tl.arange(0, PADDED) < part, found, 0), 0)
            for start in range(0, PART, TILE):
                tokens = part * PART + start + tl.arange(0, TILE)
                values = tl.load(probs + row * VOCAB + tokens, mask=tokens < VOCAB, other=-1.0)
                is_in = values >= least
                ends = tl.cumsum(is_in.to(tl.int32), 0)
                tl.store(ids + row * VOCAB + place + ends - 1, tokens, mask=is_in)
                place += tl.max(ends, 0)
