"""Causal attention over a paged KV cache, as Triton kernels: decode, merge, prefill.

Theory of operation. Keys come in chunks of ``CHUNK`` positions, counted from position 0 of the
sequence. What a query makes of one chunk is a *partial*: the greatest score, the sum of the
weights, and the weighted sum of the values (the online softmax of FlashAttention, Dao 2022, within
the chunk). A query's result is its partials folded in the order of the chunks. Decode computes the
partials of a step in parallel, stores them and folds them in a second kernel (split-KV, as
Flash-Decoding does); prefill folds as it goes. Both use ``_attend_chunk`` and ``_fold``.

Hence a query's result depends on its own keys only: not on the other sequences, not on how many
queries its chunk of the prompt has, not on how many programs share the work. That its bits do not
depend on them either needs equal instructions as well: for half types both kernels split a tile's
keys over the same number of warps and use the same tensor core instruction.
``tests/engine/test_kernels.py`` looks that up in what the compiler makes for a Hopper GPU.

With a sliding window, chunks and tiles that lie before it are left out. Where some queries of a
tile see one and others do not, these get an empty partial of it, and folding that in changes no
bit: so a query's result does not depend on what its neighbours' windows begin with.

The query heads of a group share their keys, so they are folded into rows of one matrix, padded to
the 16 that a tensor core wants.

Where a step's chunks lie is in ``meta``, one int32 array with sections that its header points to;
see ``attention/triton_plan.py``, which fills it.
"""

import triton
import triton.language as tl

CHUNK = 256  # keys of a partial
NUM_WARPS = 4
DECODE_ROWS = 16  # at least: a tensor core's left matrix has so many
PREFILL_ROWS = 32  # at least; from 64 on a Hopper GPU would use an instruction with other bits
HEADER_LEN = 16
# Entries of the header: where each section begins.
QUERY_STARTS, QUERY_LENS, CONTEXTS, TABLE_STARTS, TABLES, ITEM_STARTS, ITEMS, SLICES, TILES = range(
    9
)

_INTERPRETS = tl.constexpr(triton.knobs.runtime.interpret)
_LOWEST = tl.constexpr(-1e30)  # below any score, and no infinity: their difference is no number
_QUERY_STARTS = tl.constexpr(QUERY_STARTS)
_QUERY_LENS = tl.constexpr(QUERY_LENS)
_CONTEXTS = tl.constexpr(CONTEXTS)
_TABLE_STARTS = tl.constexpr(TABLE_STARTS)
_TABLES = tl.constexpr(TABLES)
_ITEM_STARTS = tl.constexpr(ITEM_STARTS)
_ITEMS = tl.constexpr(ITEMS)
_SLICES = tl.constexpr(SLICES)
_TILES = tl.constexpr(TILES)


@triton.jit
def _entry(meta, section: tl.constexpr, index):
    """Entry ``index`` of a section of the plan."""
    return tl.load(meta + tl.load(meta + section) + index)


@triton.jit
def _dot(a, b, acc):
    """acc + a b in float32.

    The interpreter multiplies with NumPy, which knows no bfloat16, and rounds a row by its place in
    the matrix, as no tensor core does; in float64 neither shows.
    """
    if _INTERPRETS:
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return acc + product.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _attend_chunk(
    q,  # [rows, DIM]
    positions,  # [rows]: of the queries; they see what is not after them
    first_key,  # of the chunk
    first_seen,  # keys before it are in no row's window
    end_key,  # keys from there on are not read
    keys,  # pointer to this kv head's part of slot 0; values likewise
    values,
    table,  # pointer to the sequence's block table
    slot_stride,
    scale,  # of the scores, with log2(e) in it
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The partial of one chunk: greatest score [rows], sum of weights [rows], mix [rows, DIM]."""
    ROWS: tl.constexpr = q.shape[0]
    DIM: tl.constexpr = q.shape[1]
    dims = tl.arange(0, DIM)
    greatest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    end_of_chunk = tl.minimum(first_key + CHUNK, end_key)
    if WINDOW:
        first_key = tl.maximum(first_key, first_seen // TILE * TILE)
    for tile_start in range(first_key, end_of_chunk, TILE):
        key_positions = tile_start + tl.arange(0, TILE)
        is_there = key_positions < end_key
        blocks = tl.load(table + key_positions // BLOCK, mask=is_there, other=0)
        slots = blocks.to(tl.int64) * BLOCK + key_positions % BLOCK
        offsets = slots[:, None] * slot_stride + dims[None, :]
        is_loaded = is_there[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(keys + offsets, mask=is_loaded, other=0.0)
        scores = _dot(q, tl.trans(key), tl.zeros([ROWS, TILE], tl.float32)) * scale
        is_seen = key_positions[None, :] <= positions[:, None]
        if WINDOW:
            is_seen &= key_positions[None, :] > positions[:, None] - WINDOW
        scores = tl.where(is_seen & is_there[None, :], scores, float("-inf"))
        new = tl.maximum(greatest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(greatest - new)
        total = tl.fma(total, shrink, tl.sum(weights, 1))
        value = tl.load(values + offsets, mask=is_loaded, other=0.0)
        mixed = _dot(weights.to(value.dtype), value, mixed * shrink[:, None])
        greatest = new
    return greatest, total, mixed


@triton.jit
def _first_seen(position, WINDOW: tl.constexpr):
    """The first key that a query sees."""
    if WINDOW:
        return tl.maximum(position - WINDOW + 1, 0)
    return 0


@triton.jit
def _fold(greatest, total, mixed, next_greatest, next_total, next_mixed):
    """Two partials as one; the fused products are written out so that all kernels round alike."""
    new = tl.maximum(greatest, next_greatest)
    shrink = tl.exp2(greatest - new)
    next_shrink = tl.exp2(next_greatest - new)
    total = tl.fma(total, shrink, next_total * next_shrink)
    mixed = tl.fma(mixed, shrink[:, None], next_mixed * next_shrink[:, None])
    return new, total, mixed


@triton.jit(do_not_specialize=["slice_index"])
def decode_kernel(
    q,  # [rows, heads, head_dim]
    keys,  # [slots, kv_heads, head_dim]; values likewise
    values,
    meta,
    greatest_out,  # [items, heads]
    total_out,  # [items, heads]
    mixed_out,  # [items, heads, head_dim], float32
    slice_index,
    scale,
    q_stride,
    slot_stride,
    num_kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: everything is seen
):
    """The partials of one slice of the items; an item is a chunk of a sequence with one query.

    Programs share the items in turn, so their number has no influence on the result, and a
    captured graph of them serves any number of items.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    is_row = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    first_item = _entry(meta, _SLICES, slice_index)
    end_item = _entry(meta, _SLICES, slice_index + 1)
    first_work = first_item * num_kv_heads + tl.program_id(0)
    for work in range(first_work, end_item * num_kv_heads, tl.num_programs(0)):
        item = work // num_kv_heads
        kv_head = work % num_kv_heads
        sequence = _entry(meta, _ITEMS, item)
        context = _entry(meta, _CONTEXTS, sequence)
        first_seen = _first_seen(context - 1, WINDOW)
        chunk = first_seen // CHUNK + item - _entry(meta, _ITEM_STARTS, sequence)
        heads = kv_head * GROUP + rows
        query = _entry(meta, _QUERY_STARTS, sequence).to(tl.int64)
        q_offsets = query * q_stride + heads[:, None] * HEAD_DIM + dims[None, :]
        greatest, total, mixed = _attend_chunk(
            tl.load(q + q_offsets, mask=is_row, other=0.0),
            tl.full([ROWS], 0, tl.int32) + context - 1,
            chunk * CHUNK,
            first_seen,
            context,
            keys + kv_head * HEAD_DIM,
            values + kv_head * HEAD_DIM,
            meta + tl.load(meta + _TABLES) + _entry(meta, _TABLE_STARTS, sequence),
            slot_stride,
            scale,
            BLOCK,
            CHUNK,
            TILE,
            HEAD_DIM,
            WINDOW,
        )
        out = (item - first_item) * num_kv_heads * GROUP + heads
        tl.store(greatest_out + out, greatest, mask=rows < GROUP)
        tl.store(total_out + out, total, mask=rows < GROUP)
        tl.store(mixed_out + out[:, None] * HEAD_DIM + dims[None, :], mixed, mask=is_row)


@triton.jit(do_not_specialize=["slice_index", "first_sequence"])
def merge_kernel(
    out,  # [rows, heads, head_dim]
    meta,
    greatest_in,  # what decode_kernel wrote
    total_in,
    mixed_in,
    slice_index,
    first_sequence,
    num_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Fold the partials of each sequence with one query and a kv head; 0 where there are none."""
    sequence = first_sequence + tl.program_id(0)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    is_row = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = tl.program_id(1) * GROUP + rows
    greatest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    first_item = _entry(meta, _SLICES, slice_index)
    start = _entry(meta, _ITEM_STARTS, sequence) - first_item
    end = _entry(meta, _ITEM_STARTS, sequence + 1) - first_item
    if _entry(meta, _QUERY_LENS, sequence) == 1:
        for item in range(start, end):
            partial = item * num_heads + heads
            offsets = partial[:, None] * HEAD_DIM + dims[None, :]
            greatest, total, mixed = _fold(
                greatest,
                total,
                mixed,
                tl.load(greatest_in + partial, mask=rows < GROUP, other=0.0),
                tl.load(total_in + partial, mask=rows < GROUP, other=0.0),
                tl.load(mixed_in + offsets, mask=is_row, other=0.0),
            )
        query = _entry(meta, _QUERY_STARTS, sequence).to(tl.int64)
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]
        offsets = (query * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=is_row)


@triton.jit
def prefill_kernel(
    out,  # [rows, heads, head_dim]
    q,
    keys,
    values,
    meta,
    scale,
    q_stride,
    slot_stride,
    num_kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Some successive queries of a sequence, as many as fit into ROWS with all heads of a group."""
    QUERIES: tl.constexpr = ROWS // GROUP
    sequence = _entry(meta, _TILES, 2 * tl.program_id(0))
    first_query = _entry(meta, _TILES, 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    query_len = _entry(meta, _QUERY_LENS, sequence)
    num_before = _entry(meta, _CONTEXTS, sequence) - query_len
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    query = first_query + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    is_query = (rows < QUERIES * GROUP) & (query < query_len)
    is_row = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    token = (_entry(meta, _QUERY_STARTS, sequence) + query).to(tl.int64)
    offsets = token[:, None] * q_stride + head[:, None] * HEAD_DIM + dims[None, :]
    q_tile = tl.load(q + offsets, mask=is_row, other=0.0)
    positions = tl.where(is_query, num_before + query, -1)
    end_key = num_before + tl.minimum(first_query + QUERIES, query_len)
    greatest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    first_seen = _first_seen(num_before + first_query, WINDOW)
    for first_key in range(first_seen // CHUNK * CHUNK, end_key, CHUNK):
        next_greatest, next_total, next_mixed = _attend_chunk(
            q_tile,
            positions,
            first_key,
            first_seen,
            end_key,
            keys + kv_head * HEAD_DIM,
            values + kv_head * HEAD_DIM,
            meta + tl.load(meta + _TABLES) + _entry(meta, _TABLE_STARTS, sequence),
            slot_stride,
            scale,
            BLOCK,
            CHUNK,
            TILE,
            HEAD_DIM,
            WINDOW,
        )
        greatest, total, mixed = _fold(
            greatest, total, mixed, next_greatest, next_total, next_mixed
        )
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    offsets = (token * num_kv_heads * GROUP + head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=is_row)
