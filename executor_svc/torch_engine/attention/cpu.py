"""Paged attention for the CPU: gather keys by position, then torch's fused attention.

On a CPU that is FlashAttention (Dao 2022) over keys in blocks of 512, merged in order, with float32
sums. A query's result has the same bits whether its chunk is long or one token, alone or in
company, as long as a call's shape keeps to some sizes (measured, tested; an engine proves it when
it loads a model, see exactness.py):

- keys are counted from position 0 and padded up to one of ``_WIDTHS`` in their last block: matrix
  products cut a sum over more than 192 keys in halves, and over more than 384 at 192 and on. What a
  query may not see is masked, and then adds 0. Where a sliding window hides whole blocks of 512
  from all queries of a call they are left out, which changes no bit of those that see none of them;
- queries come in tiles of at most 128 rows, since from 192 on the blocks of queries grow, and of a
  multiple of 4: products with fewer rows take another path.

The query heads of a group share their keys, so they are folded into rows: a decode token of a
model with 8 query heads to a kv head is one [8, head_dim] matrix.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from executor_svc.torch_engine.attention.base import StepLayout
from executor_svc.torch_engine.kv_cache import KVCache, kv_slots
from executor_svc.torch_engine.windows import Windows, first_seen

_KEY_BLOCK = 512  # torch's own
_WIDTHS = (64, 128, 192, 384, 512)
_TILE_ROWS = 128
_ROW_MULTIPLE = 4


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows [start, end) of the folded queries of each chunk, and what they see.

    The last rows may fill the tile up and be those of the next tile; they are dropped.
    """

    start: int
    end: int
    num_rows: int
    keys: slice  # of the group's; those outside nobody sees
    mask: Tensor  # [chunks, 1, rows or 1, keys]: 0 or -inf


@dataclass(frozen=True, slots=True)
class _Group:
    """Chunks of equal length and width, computed together."""

    rows: Tensor  # [chunks, query_len]: their rows in the step
    slots: Tensor  # [chunks * width]: of their keys
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
        self._dtype = cache.keys.dtype
        self.numerics = f"cpu widths={_WIDTHS} tile_rows={tile_rows} row_multiple={_ROW_MULTIPLE}"
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
        starts = np.cumsum([0, *layout.query_lens])
        first_keys = []
        chunks_of: dict[tuple[int, int], list[int]] = {}
        lens = zip(layout.query_lens, layout.context_lens, strict=True)
        for chunk, (query_len, context) in enumerate(lens):
            first_keys.append(_first_block(context - query_len, window))
            key = query_len, padded_width(context - first_keys[chunk])
            chunks_of.setdefault(key, []).append(chunk)
        groups = []
        step = self._queries_per_tile
        for (query_len, width), chunks in chunks_of.items():
            slots = np.full((len(chunks), width), self._cache.null_slot)
            for row, chunk in enumerate(chunks):
                first, context = first_keys[chunk], layout.context_lens[chunk]
                table = layout.block_tables[chunk]
                slots[row, : context - first] = kv_slots(
                    table, first, context, self._cache.block_size
                )
            # Counted from the first key, which may be another one for each chunk.
            num_keys = np.array(
                [layout.context_lens[chunk] - first_keys[chunk] for chunk in chunks]
            )
            first_positions = num_keys - query_len
            tiles = [
                self._tile(first_positions, first, min(first + step, query_len), window)
                for first in range(0, query_len, step)
            ]
            groups.append(
                _Group(
                    rows=self._to(starts[chunks][:, None] + np.arange(query_len)),
                    slots=self._to(slots.ravel()),
                    num_folded=tiles[-1].end,
                    tiles=tiles,
                )
            )
        return groups

    def _tile(self, first_positions: np.ndarray, first: int, end: int, window: int | None) -> _Tile:
        """Queries [first, end) of chunks that begin at these positions."""
        positions = np.repeat(
            first_positions[:, None] + np.arange(first, end), self._group_size, axis=1
        )
        # Padding rows sit where the last one does: they see a key, so their softmax is defined.
        num_rows = positions.shape[1]
        padding = -num_rows % _ROW_MULTIPLE
        if end - first == 1:
            positions = positions[:, :1]  # one for all rows
        else:
            positions = np.pad(positions, ((0, 0), (0, padding)), mode="edge")
        seen = slice(
            _first_block(int(positions.min()), window), padded_width(int(positions.max()) + 1)
        )
        keys, positions = np.arange(seen.start, seen.stop), positions[:, None, :, None]
        is_hidden = keys > positions
        if window is not None:
            is_hidden |= keys <= positions - window
        mask = np.where(is_hidden, -np.inf, 0.0)
        start = first * self._group_size
        return _Tile(
            start=start,
            end=start + num_rows + padding,
            num_rows=num_rows,
            keys=seen,
            mask=self._to(mask.astype(np.float32)).to(self._dtype),
        )

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def run(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_tokens = self._slots.shape[0]
        self._cache.write(layer_index, self._slots, k[:num_tokens], v[:num_tokens])
        keys, values = self._cache.keys[layer_index], self._cache.values[layer_index]
        out = q.new_zeros(q.shape)
        for group in self._groups[self._windows[layer_index]]:
            out[group.rows] = self._attend(group, q[group.rows], keys, values)
        return out.flatten(1)

    def _attend(self, group: _Group, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of one group, [chunks, query_len, heads, head_dim].

        q is the same shape, keys and values are [kv_heads, slots, head_dim].
        """
        queries = self._fold(q, group.num_folded)
        keys, values = self._gather(keys, group), self._gather(values, group)
        mixed = []
        for tile in group.tiles:
            attended = F.scaled_dot_product_attention(
                queries[:, :, tile.start : tile.end],
                keys[:, :, tile.keys],
                values[:, :, tile.keys],
                attn_mask=tile.mask,
            )
            mixed.append(attended[:, :, : tile.num_rows])
        return self._unfold(mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2), q.shape[1])

    def _gather(self, cache: Tensor, group: _Group) -> Tensor:
        """Rows of one layer's cache as [chunks, kv_heads, width, head_dim]."""
        rows = cache.index_select(1, group.slots)
        return rows.view(self._num_kv_heads, group.rows.shape[0], -1, self._head_dim).transpose(
            0, 1
        )

    def _fold(self, q: Tensor, num_folded: int) -> Tensor:  # [chunks, query_len, heads, head_dim]
        """Queries as [chunks, kv_heads, padded rows, head_dim]."""
        chunks, query_len = q.shape[:2]
        num_rows = query_len * self._group_size
        q = q.view(chunks, query_len, self._num_kv_heads, self._group_size, self._head_dim)
        q = q.transpose(1, 2).reshape(chunks, self._num_kv_heads, num_rows, self._head_dim)
        return F.pad(q, (0, 0, 0, num_folded - num_rows)) if num_folded > num_rows else q

    def _unfold(self, x: Tensor, query_len: int) -> Tensor:
        """The reverse of ``_fold``."""
        x = x[:, :, : query_len * self._group_size]
        x = x.unflatten(2, (query_len, self._group_size))
        return x.transpose(1, 2).flatten(2, 3)


def _first_block(position: int, window: int | None) -> int:
    """The first key of the first block of keys that a query sees something of."""
    return first_seen(position, window) // _KEY_BLOCK * _KEY_BLOCK


def padded_width(num_keys: int) -> int:
    """How many keys a call takes, for some that have to be seen."""
    blocks, rest = divmod(num_keys, _KEY_BLOCK)
    last = next(width for width in (0, *_WIDTHS) if width >= rest)
    return blocks * _KEY_BLOCK + last
