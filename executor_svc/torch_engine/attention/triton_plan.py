"""What the Triton kernels are told about a step: one int32 array, one copy to the device.

The array begins with a header that says where its sections begin (``kernels/paged_attention.py``
names them), so a captured graph reads steps of any shape from one address:

- for each sequence: where its queries start, how many there are, its context, and where its part
  of ``TABLES`` starts, which is the block tables one after the other;
- the items of a decode step, each a chunk of keys of a sequence that has one query: ``ITEMS`` has
  the sequence of each, ``ITEM_STARTS`` the first item of each sequence. Chunks that lie before a
  layer's window are no items, so layers of different windows have plans of their own;
- ``SLICES``: partials have a workspace of a limited size, so items go in slices that fit;
- ``TILES``: for prefill, the sequence of each tile of queries and its first query.
"""

from dataclasses import dataclass

import numpy as np

from executor_svc.torch_engine.attention.base import StepLayout, StepLimits
from executor_svc.torch_engine.kernels.paged_attention import (
    CHUNK,
    CONTEXTS,
    HEADER_LEN,
    ITEM_STARTS,
    ITEMS,
    QUERY_LENS,
    QUERY_STARTS,
    SLICES,
    TABLE_STARTS,
    TABLES,
    TILES,
)


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """A step for the kernels; slice i folds ``slices[i]`` sequences."""

    meta: np.ndarray  # int32
    slices: tuple[range, ...]
    num_tiles: int  # of prefill
    has_decode: bool
    is_pure_decode: bool


def make_plan(
    layout: StepLayout, *, queries_per_tile: int, max_items: int, window: int | None = None
) -> TritonPlan:
    """Plan a step for layers of a window; ``max_items`` is how many partials the workspace holds.

    One sequence's items always have to fit: ``max_items`` is at least what the longest context has.
    """
    query_lens = np.asarray(layout.query_lens, dtype=np.int64)
    contexts = np.asarray(layout.context_lens, dtype=np.int64)
    is_decode = query_lens == 1
    num_hidden = 0 if window is None else np.maximum(contexts - window, 0) // CHUNK
    num_items = np.where(is_decode, -(-contexts // CHUNK) - num_hidden, 0)
    item_starts = _starts(num_items)
    slices = _slices(item_starts, max_items)
    num_tiles = np.where(is_decode, 0, -(-query_lens // queries_per_tile))
    tile_sequences = np.repeat(np.arange(len(query_lens)), num_tiles)
    first_queries = (np.arange(len(tile_sequences)) - _starts(num_tiles)[tile_sequences]) * (
        queries_per_tile
    )
    table_lens = [len(table) for table in layout.block_tables]
    sections = {
        QUERY_STARTS: _starts(query_lens),
        QUERY_LENS: query_lens,
        CONTEXTS: contexts,
        TABLE_STARTS: _starts(np.asarray(table_lens)),
        ITEM_STARTS: item_starts,
        ITEMS: np.repeat(np.arange(len(query_lens)), num_items),
        SLICES: item_starts[[part.start for part in slices] + [len(query_lens)]],
        TILES: np.stack([tile_sequences, first_queries], axis=1).ravel(),
        TABLES: np.concatenate([np.asarray(table, np.int64) for table in layout.block_tables]),
    }
    return TritonPlan(
        meta=_pack(sections),
        slices=slices,
        num_tiles=len(tile_sequences),
        has_decode=bool(is_decode.any()),
        is_pure_decode=bool(is_decode.all()),
    )


def max_meta_len(limits: StepLimits, *, block_size: int, queries_per_tile: int) -> int:
    """The longest ``meta`` that a step within the limits can have."""
    num_sequences = limits.max_num_seqs + 1
    max_tiles = limits.max_num_tokens // queries_per_tile + num_sequences
    return (
        HEADER_LEN
        + 6 * num_sequences
        + 2 * max_tiles
        + num_sequences * max_num_items(limits.max_context_tokens)
        + num_sequences * -(-limits.max_context_tokens // block_size)
    )


def max_num_items(context_tokens: int) -> int:
    """How many partials a query with such a context has."""
    return -(-context_tokens // CHUNK)


def _starts(lens: np.ndarray) -> np.ndarray:
    """Where each part starts if they lie one after the other, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(lens)])


def _slices(item_starts: np.ndarray, max_items: int) -> tuple[range, ...]:
    """Successive sequences, together as long as their items fit."""
    slices = []
    first, num_sequences = 0, len(item_starts) - 1
    while first < num_sequences:
        end = int(np.searchsorted(item_starts, item_starts[first] + max_items, side="right")) - 1
        assert end > first, "the workspace is smaller than one sequence"
        slices.append(range(first, end))
        first = end
    return tuple(slices)


def _pack(sections: dict[int, np.ndarray]) -> np.ndarray:
    """The header and all sections as one array."""
    header = np.zeros(HEADER_LEN, dtype=np.int64)
    end = HEADER_LEN
    for section, entries in sections.items():
        header[section] = end
        end += len(entries)
    return np.concatenate([header, *sections.values()]).astype(np.int32)
