"""Paged attention for the CPU: gather keys by position, then attend to them (cpu_products.py).

A query's result has the same bits whether its chunk is long or one token, alone or in company, as
long as a call's shape keeps to some sizes (measured, tested; an engine proves it when it loads a
model, see exactness.py):

- keys are counted from position 0 and padded up to one of a few widths. What a query may not see is
  masked, and then adds 0. Where a sliding window hides whole blocks of 512 from all queries of a
  call they are left out, which changes no bit of those that see none of them;
- queries come in tiles of at most 128 rows, and of a multiple of 4.

The query heads of a group share their keys, so they are folded into rows: a decode token of a
model with 8 query heads to a kv head is one [8, head_dim] matrix. Chunks are computed a few at a
time: what was gathered is then still in the processor's caches when it is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from executor_svc.torch_engine.attention.base import StepLayout
from executor_svc.torch_engine.attention.cpu_products import choose_attend
from executor_svc.torch_engine.kv_cache import KVCache, kv_slots
from executor_svc.torch_engine.windows import Windows, first_seen

_KEY_BLOCK = 512  # that of torch's fused attention
_TILE_ROWS = 128
_CHUNKS_AT_A_TIME = 8  # or 4, 2, 1


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows [start, end) of the folded queries of each chunk, and what they see.

    The last rows may fill the tile up and be those of the next tile; they are dropped.
    """

    start: int
    end: int
    num_rows: int
    keys: slice  # of the group's; those outside nobody sees
    mask: Tensor  # [1, chunks, rows or 1, keys]: 0 or -inf


@dataclass(frozen=True, slots=True)
class _Group:
    """Chunks of equal length and width, computed together."""

    rows: Tensor  # [chunks * query_len]: their rows in the step
    num_chunks: int
    slots: Tensor  # [kv_heads * chunks * width]: where their keys are in one layer's cache
    num_folded: int  # rows of a kv head, padded
    tiles: list[_Tile]


class CpuAttention:
    """See the module's text. ``tile_rows`` is part of the numbers: equal engines, equal tiles."""

    name = "cpu"
    supports_graphs = False
    can_replay = False
    paged = None

    def __init__(
        self, cache: KVCache, *, num_heads: int, windows: Windows, tile_rows: int = _TILE_ROWS
    ) -> None:
        self._cache, self._windows = cache, windows
        self._attend = choose_attend(cache.keys.dtype)
        self.numerics = f"cpu {self._attend.numerics} tile_rows={tile_rows}"
        _, self._num_kv_heads, _, self._head_dim = cache.keys.shape
        self._group_size = num_heads // self._num_kv_heads
        self._queries_per_tile = max(1, tile_rows // self._group_size)
        self._device = cache.keys.device
        self._groups: dict[int | None, list[_Group]] = {window: [] for window in windows}
        self._slots = torch.empty(0, dtype=torch.int64)

    def plan(self, layout: StepLayout) -> None:
        self._slots = layout.kv_slot_mapping
        for window in self._groups:
            self._groups[window] = self._plan_groups(layout, window)

    def _plan_groups(self, layout: StepLayout, window: int | None) -> list[_Group]:
        """The step as layers of one window see it."""
        first_keys = []
        chunks_of: dict[tuple[int, int], list[int]] = {}
        lens = zip(layout.query_lens, layout.context_lens, strict=True)
        for chunk, (query_len, context) in enumerate(lens):
            first_keys.append(_first_block(context - query_len, window))
            key = query_len, self._attend.width(context - first_keys[chunk])
            chunks_of.setdefault(key, []).append(chunk)
        return [
            self._group(layout, some, first_keys, width, window)
            for (_, width), chunks in chunks_of.items()
            for some in _pieces(chunks)
        ]

    def _group(
        self,
        layout: StepLayout,
        chunks: list[int],
        first_keys: list[int],
        width: int,
        window: int | None,
    ) -> _Group:
        """Some chunks of equal length, the first key of each of all the step's, and a width."""
        starts = np.cumsum([0, *layout.query_lens])[chunks]
        query_len = layout.query_lens[chunks[0]]
        slots = np.full((len(chunks), width), self._cache.null_slot)
        for row, chunk in enumerate(chunks):
            first, context = first_keys[chunk], layout.context_lens[chunk]
            table = layout.block_tables[chunk]
            slots[row, : context - first] = kv_slots(table, first, context, self._cache.block_size)
        # Counted from the first key, which may be another one for each chunk.
        num_keys = np.array([layout.context_lens[chunk] - first_keys[chunk] for chunk in chunks])
        step = self._queries_per_tile
        tiles = [
            self._tile(num_keys - query_len, first, min(first + step, query_len), width, window)
            for first in range(0, query_len, step)
        ]
        heads = np.arange(self._num_kv_heads) * self._cache.keys.shape[2]
        return _Group(
            rows=self._to((starts[:, None] + np.arange(query_len)).ravel()),
            num_chunks=len(chunks),
            slots=self._to((heads[:, None] + slots.ravel()).ravel()),
            num_folded=tiles[-1].end,
            tiles=tiles,
        )

    def _tile(
        self, first_positions: np.ndarray, first: int, end: int, width: int, window: int | None
    ) -> _Tile:
        """Queries [first, end) of chunks that begin at these positions and have so many keys."""
        positions = np.repeat(
            first_positions[:, None] + np.arange(first, end), self._group_size, axis=1
        )
        # Padding rows sit where the last one does: they see a key, so their softmax is defined.
        num_rows = positions.shape[1]
        padding = self._attend.rows(num_rows) - num_rows
        if end - first == 1:
            positions = positions[:, :1]  # one for all rows
        else:
            positions = np.pad(positions, ((0, 0), (0, padding)), mode="edge")
        first_key = _first_block(int(positions.min()), window)
        num_keys = self._attend.width(int(positions.max()) + 1 - first_key)
        seen = slice(first_key, min(first_key + num_keys, width))
        keys, positions = np.arange(seen.start, seen.stop), positions[None, :, :, None]
        is_hidden = keys > positions
        if window is not None:
            is_hidden |= keys <= positions - window
        start = first * self._group_size
        return _Tile(
            start=start,
            end=start + num_rows + padding,
            num_rows=num_rows,
            keys=seen,
            mask=self._to(np.where(is_hidden, -np.inf, 0.0)).to(self._attend.mask_dtype),
        )

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def run(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_tokens = self._slots.shape[0]
        self._cache.write(layer_index, self._slots, k[:num_tokens], v[:num_tokens])
        out = q.new_zeros(q.shape)
        for group in self._groups[self._windows[layer_index]]:
            queries = self._fold(q.index_select(0, group.rows), group)
            keys = self._gather(self._cache.keys[layer_index], group)
            values = self._gather(self._cache.values[layer_index], group)
            out.index_copy_(0, group.rows, self._unfold(self._mix(queries, keys, values, group)))
        return out.flatten(1)

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, group: _Group) -> Tensor:
        """Attention of one group; all are [kv_heads, chunks, rows or width, head_dim]."""
        mixed = []
        for tile in group.tiles:
            rows = queries[:, :, tile.start : tile.end]
            attended = self._attend(rows, keys[:, :, tile.keys], values[:, :, tile.keys], tile.mask)
            mixed.append(attended[:, :, : tile.num_rows])
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)

    def _gather(self, cache: Tensor, group: _Group) -> Tensor:  # [kv_heads, slots, head_dim]
        """Rows of one layer's cache as [kv_heads, chunks, width, head_dim]."""
        rows = cache.flatten(0, 1).index_select(0, group.slots)
        return rows.view(self._num_kv_heads, group.num_chunks, -1, self._head_dim)

    def _fold(self, q: Tensor, group: _Group) -> Tensor:  # [chunks * query_len, heads, head_dim]
        """Queries as [kv_heads, chunks, padded rows, head_dim]."""
        shape = group.num_chunks, -1, self._num_kv_heads, self._group_size, self._head_dim
        q = q.view(shape).permute(2, 0, 1, 3, 4).flatten(2, 3)
        padding = group.num_folded - q.shape[2]
        return F.pad(q, (0, 0, 0, padding)) if padding else q

    def _unfold(self, x: Tensor) -> Tensor:  # [kv_heads, chunks, rows, head_dim]
        """The reverse of ``_fold``."""
        num_heads, num_chunks, _, head_dim = x.shape
        x = x.reshape(num_heads, num_chunks, -1, self._group_size, head_dim)
        return x.permute(1, 2, 0, 3, 4).reshape(-1, num_heads * self._group_size, head_dim)


def _pieces(chunks: list[int]) -> Iterator[list[int]]:
    start = 0
    while rest := len(chunks) - start:
        size = min(_CHUNKS_AT_A_TIME, 1 << rest.bit_length() - 1)
        yield chunks[start : start + size]
        start += size


def _first_block(position: int, window: int | None) -> int:
    """The first key of the first block of keys that a query sees something of."""
    return first_seen(position, window) // _KEY_BLOCK * _KEY_BLOCK
