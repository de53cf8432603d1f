"""Paged attention in plain torch: gather, multiply, merge; float32 throughout.

Made for the CPU, right on any device. Two things make a query's result the same bits whether its
chunk is long or one token, alone or in company (measured on CPU, tested):

- keys come in tiles of one fixed size, counted from position 0, and are merged in order (the
  online softmax of FlashAttention, Dao 2022); a tile that a query may not see changes nothing;
- query rows are padded to multiples of 8: from 4 rows on, bmm gives a row the same result in any
  number of rows and of matrices.

The query heads of a group share their keys, so they are folded into rows: a decode token of a
model with 8 query heads to a kv head is one [8, head_dim] matrix.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor_svc.torch_engine.attention.base import StepLayout
from executor_svc.torch_engine.kv_cache import KVCache, kv_slots

_KEY_TILE = 128
_ROW_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class _Group:
    """Chunks of equal length, longest context first, computed together."""

    rows: Tensor  # [chunks, query_len]: their rows in the step
    positions: Tensor  # [chunks, padded rows of a kv head, 1]: position of each query row
    tiles: list[Tensor]  # slots of the keys of each tile, [chunks that reach it * _KEY_TILE]


class CpuAttention:
    """See the module's text. ``key_tile`` is part of the numbers: equal engines, equal tiles."""

    name = "cpu"
    supports_graphs = False
    can_replay = False

    def __init__(self, cache: KVCache, *, num_heads: int, key_tile: int = _KEY_TILE) -> None:
        self._cache = cache
        self._key_tile = key_tile
        self.numerics = f"cpu key_tile={key_tile} row_multiple={_ROW_MULTIPLE}"
        _, self._num_kv_heads, _, self._head_dim = cache.keys.shape
        self._group_size = num_heads // self._num_kv_heads
        self._device = cache.keys.device
        self._groups: list[_Group] = []
        self._slots = torch.empty(0, dtype=torch.int64)

    def plan(self, layout: StepLayout) -> None:
        self._slots = layout.kv_slot_mapping
        starts = np.cumsum([0, *layout.query_lens])
        chunks_of: dict[int, list[int]] = {}
        for chunk, query_len in enumerate(layout.query_lens):
            chunks_of.setdefault(query_len, []).append(chunk)
        self._groups = []
        for query_len, chunks in chunks_of.items():
            chunks.sort(key=lambda chunk: -layout.context_lens[chunk])
            rows = starts[chunks][:, None] + np.arange(query_len)
            contexts = np.array([layout.context_lens[chunk] for chunk in chunks])
            positions = np.repeat(
                contexts[:, None] - query_len + np.arange(query_len), self._group_size, axis=1
            )
            # Padding rows sit at position 0: they see one key, so their softmax is defined.
            padding = -positions.shape[1] % _ROW_MULTIPLE
            positions = np.pad(positions, ((0, 0), (0, padding)))[:, :, None]
            tiles = self._key_tiles([layout.block_tables[chunk] for chunk in chunks], contexts)
            self._groups.append(_Group(self._to(rows), self._to(positions), tiles))

    def _key_tiles(self, block_tables: list[list[int]], contexts: np.ndarray) -> list[Tensor]:
        """For each tile of keys, the slots of the chunks whose context reaches into it."""
        num_tiles = -(-int(contexts[0]) // self._key_tile)
        slots = np.full((len(contexts), num_tiles * self._key_tile), self._cache.null_slot)
        for row, (table, context) in enumerate(zip(block_tables, contexts, strict=True)):
            slots[row, :context] = kv_slots(table, 0, int(context), self._cache.block_size)
        tiles = []
        for start in range(0, slots.shape[1], self._key_tile):
            num_reaching = int((contexts > start).sum())
            tiles.append(self._to(slots[:num_reaching, start : start + self._key_tile].ravel()))
        return tiles

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def run(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_tokens = self._slots.shape[0]
        self._cache.write(layer_index, self._slots, k[:num_tokens], v[:num_tokens])
        keys, values = self._cache.keys[layer_index], self._cache.values[layer_index]
        out = q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
        for group in self._groups:
            out[group.rows.flatten()] = self._attend(group, q, keys, values).to(q.dtype)
        return out

    def _attend(self, group: _Group, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of one group, [chunks * query_len, heads * head_dim].

        q is [rows, heads, head_dim], keys and values are [kv_heads, slots, head_dim].
        """
        queries = self._fold(q[group.rows])  # [kv_heads, chunks, rows, head_dim]
        greatest = queries.new_full((*queries.shape[:-1], 1), -math.inf)
        total = torch.zeros_like(greatest)
        mixed = torch.zeros_like(queries)
        for tile, slots in enumerate(group.tiles):
            reach = slots.shape[0] // self._key_tile  # the first so many chunks
            tile_keys, tile_values = self._gather(keys, slots), self._gather(values, slots)
            scores = _matmul(queries[:, :reach], tile_keys.transpose(2, 3))
            positions = torch.arange(self._key_tile, device=q.device) + tile * self._key_tile
            scores.masked_fill_(positions > group.positions[:reach], -math.inf)
            old = greatest[:, :reach]
            new = torch.maximum(old, scores.amax(-1, keepdim=True))
            weights = torch.exp(scores - new)
            shrink = torch.exp(old - new)
            total[:, :reach] = total[:, :reach] * shrink + weights.sum(-1, keepdim=True)
            mixed[:, :reach] = mixed[:, :reach] * shrink + _matmul(weights, tile_values)
            greatest[:, :reach] = new
        return self._unfold(mixed / total, group.rows.shape[1])

    def _gather(self, cache: Tensor, slots: Tensor) -> Tensor:
        """Rows of one layer's cache as [kv_heads, chunks, key_tile, head_dim]."""
        rows = cache.index_select(1, slots).float()
        return rows.view(self._num_kv_heads, -1, self._key_tile, self._head_dim)

    def _fold(self, q: Tensor) -> Tensor:  # [chunks, query_len, heads, head_dim]
        """Scaled queries as [kv_heads, chunks, padded rows, head_dim]."""
        chunks, query_len = q.shape[:2]
        num_rows = query_len * self._group_size
        padded = num_rows + -num_rows % _ROW_MULTIPLE
        queries = q.new_zeros(
            (self._num_kv_heads, chunks, padded, self._head_dim), dtype=torch.float32
        )
        q = q.view(chunks, query_len, self._num_kv_heads, self._group_size, self._head_dim)
        queries[:, :, :num_rows] = (
            q.permute(2, 0, 1, 3, 4).reshape(self._num_kv_heads, chunks, num_rows, -1).float()
        )
        return queries.mul_(self._head_dim**-0.5)

    def _unfold(self, x: Tensor, query_len: int) -> Tensor:
        """The reverse of ``_fold``: [chunks * query_len, heads * head_dim]."""
        chunks = x.shape[1]
        x = x[:, :, : query_len * self._group_size]
        x = x.reshape(self._num_kv_heads, chunks, query_len, self._group_size, self._head_dim)
        return x.permute(1, 2, 0, 3, 4).reshape(chunks * query_len, -1)


def _matmul(a: Tensor, b: Tensor) -> Tensor:  # [heads, chunks, m, n] x [heads, chunks, n, p]
    """One bmm over heads and chunks."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
