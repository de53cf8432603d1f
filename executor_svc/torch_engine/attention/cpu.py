"""Paged attention for the CPU: gather keys by position, then attend to them (cpu_products.py).

A query's result has the same bits whether its chunk is long or one token, alone or in company, as
long as a call's shape keeps to some sizes (measured, tested; an engine proves it when it loads a
model, see exactness.py):

- keys are counted from position 0 and padded up to one of a few widths. What a query may not see is
  masked, and then adds 0. Where a sliding window hides whole blocks of 512 from all queries of a
  call they are left out, which changes no bit of those that see none of them;
- queries come in tiles of at most 128 rows, and of a multiple of 4.

The query heads of a group share their keys, so they are folded into rows: a decode token of a
model with 8 query heads to a kv head is one [8, head_dim] matrix. One gather folds them and fills
them up, and one brings the results of all groups back: at a few rows a layer's time is the number
of its operations. Decode tokens are computed a few at a time: what was gathered is then still in
the processor's caches when it is read. Longer chunks fill a call each, and the shapes of calls
stay few.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor_svc.torch_engine.attention.base import StepLayout
from executor_svc.torch_engine.attention.cpu_products import choose_attend
from executor_svc.torch_engine.kv_cache import KVCache, kv_slots
from executor_svc.torch_engine.windows import Windows, first_seen

_KEY_BLOCK = 512  # that of torch's fused attention
_TILE_ROWS = 128
_TOKENS_AT_A_TIME = 8  # or 4, 2, 1


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows [start, end) of the folded queries of each chunk, and what they see."""

    start: int
    end: int
    keys: slice  # of the group's; those outside nobody sees
    mask: Tensor  # [1, chunks, rows or 1, keys]: 0 or -inf


@dataclass(frozen=True, slots=True)
class _Group:
    """Chunks of equal length and width, computed together."""

    num_chunks: int
    queries: Tensor  # [kv_heads * chunks * rows]: where they are in q [tokens * heads, head_dim]
    slots: Tensor  # [kv_heads * chunks * width]: where their keys are in one layer's cache
    tiles: list[_Tile]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A step as the layers of one window see it."""

    groups: list[_Group]
    # [tokens * heads]: where the result of each head of each token is, groups one after the other
    results: Tensor


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
        nothing = torch.empty(0, dtype=torch.int64)
        self._plans = {window: _Plan([], nothing) for window in windows}
        self._slots = nothing

    def plan(self, layout: StepLayout) -> None:
        self._slots = layout.kv_slot_mapping
        for window in self._plans:
            self._plans[window] = self._plan(layout, window)

    def _plan(self, layout: StepLayout, window: int | None) -> _Plan:
        first_keys = []
        chunks_of: dict[tuple[int, int], list[int]] = {}
        lens = zip(layout.query_lens, layout.context_lens, strict=True)
        for chunk, (query_len, context) in enumerate(lens):
            first_keys.append(_first_block(context - query_len, window))
            key = query_len, self._attend.width(context - first_keys[chunk])
            chunks_of.setdefault(key, []).append(chunk)
        starts = np.cumsum([0, *layout.query_lens])
        groups, queries = [], []
        for (query_len, width), chunks in chunks_of.items():
            tiles = self._fold(query_len)
            for some in _pieces(chunks, _TOKENS_AT_A_TIME if query_len == 1 else 1):
                queries.append(self._queries(starts[some], np.concatenate(tiles)))
                slots = self._key_slots(layout, some, first_keys, width)
                # Counted from the first key, which may be another one for each chunk.
                num_keys = [layout.context_lens[chunk] - first_keys[chunk] for chunk in some]
                positions = np.array(num_keys) - query_len
                groups.append(
                    _Group(
                        num_chunks=len(some),
                        queries=self._to(queries[-1]),
                        slots=self._to(slots),
                        tiles=list(self._tiles(positions, tiles, width, window)),
                    )
                )
        return _Plan(groups, self._to(_inverse(np.concatenate(queries))))

    def _fold(self, query_len: int) -> list[np.ndarray]:
        """The folded rows of each tile; it is filled up with its last one.

        Row r of a kv head is query r // group_size with the head r % group_size of its group.
        """
        step = self._queries_per_tile * self._group_size
        num_rows = query_len * self._group_size
        tiles = []
        for start in range(0, num_rows, step):
            rows = np.arange(start, min(start + step, num_rows))
            tiles.append(np.pad(rows, (0, self._attend.rows(len(rows)) - len(rows)), mode="edge"))
        return tiles

    def _queries(self, starts: np.ndarray, folded: np.ndarray) -> np.ndarray:
        """``_Group.queries`` of chunks that begin at these tokens of the step."""
        tokens = starts[:, None] + folded // self._group_size
        heads = np.arange(self._num_kv_heads)[:, None, None] * self._group_size
        places = tokens * self._num_kv_heads * self._group_size + folded % self._group_size
        return (heads + places).ravel()

    def _key_slots(
        self, layout: StepLayout, chunks: list[int], first_keys: list[int], width: int
    ) -> np.ndarray:
        """``_Group.slots`` of some chunks; ``first_keys`` are those of all of the step's."""
        slots = np.full((len(chunks), width), self._cache.null_slot)
        for row, chunk in enumerate(chunks):
            first, context = first_keys[chunk], layout.context_lens[chunk]
            table = layout.block_tables[chunk]
            slots[row, : context - first] = kv_slots(table, first, context, self._cache.block_size)
        heads = np.arange(self._num_kv_heads) * self._cache.keys.shape[2]
        return (heads[:, None] + slots.ravel()).ravel()

    def _tiles(
        self,
        first_positions: np.ndarray,
        folded: list[np.ndarray],
        width: int,
        window: int | None,
    ) -> Iterator[_Tile]:
        """Of chunks whose first queries are at these positions and that have so many keys."""
        start = 0
        for rows in folded:
            # Rows that fill up sit where the last one does: they see a key, so that their softmax
            # is defined.
            queries = rows // self._group_size
            if queries[0] == queries[-1]:
                queries = queries[:1]  # one for all rows
            positions = first_positions[:, None] + queries
            first_key = _first_block(int(positions.min()), window)
            num_keys = self._attend.width(int(positions.max()) + 1 - first_key)
            seen = slice(first_key, min(first_key + num_keys, width))
            keys, positions = np.arange(seen.start, seen.stop), positions[None, :, :, None]
            is_hidden = keys > positions
            if window is not None:
                is_hidden |= keys <= positions - window
            mask = self._to(np.where(is_hidden, -np.inf, 0.0)).to(self._attend.mask_dtype)
            yield _Tile(start, start + len(rows), seen, mask)
            start += len(rows)

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def run(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_tokens = self._slots.shape[0]
        self._cache.write(layer_index, self._slots, k[:num_tokens], v[:num_tokens])
        keys, values = self._cache.keys[layer_index], self._cache.values[layer_index]
        plan = self._plans[self._windows[layer_index]]
        queries = q.flatten(0, 1)
        results = [
            self._mix(
                self._gather(queries, group.queries, group),
                self._gather(keys.flatten(0, 1), group.slots, group),
                self._gather(values.flatten(0, 1), group.slots, group),
                group.tiles,
            ).view(-1, self._head_dim)
            for group in plan.groups
        ]
        out = torch.zeros_like(queries)
        found = results[0] if len(results) == 1 else torch.cat(results)
        torch.index_select(found, 0, plan.results, out=out[: len(plan.results)])
        return out.view(len(q), -1)

    def _gather(self, rows: Tensor, places: Tensor, group: _Group) -> Tensor:
        """Some of the rows, which are [any, head_dim], as [kv_heads, chunks, some, head_dim]."""
        found = rows.index_select(0, places)
        return found.view(self._num_kv_heads, group.num_chunks, -1, self._head_dim)

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, tiles: list[_Tile]) -> Tensor:
        """Attention of one group, tile after tile."""
        if len(tiles) == 1:
            return self._attend(queries, keys, values, tiles[0].mask)
        mixed = [
            self._attend(
                queries[:, :, tile.start : tile.end],
                keys[:, :, tile.keys],
                values[:, :, tile.keys],
                tile.mask,
            )
            for tile in tiles
        ]
        return torch.cat(mixed, dim=2)


def _inverse(places: np.ndarray) -> np.ndarray:
    """Where each number is among ``places``, which have all from 0 on; the first one, if twice."""
    found = np.empty(int(places.max()) + 1, dtype=np.int64)
    found[places[::-1]] = np.arange(len(places))[::-1]
    return found


def _pieces(chunks: list[int], at_a_time: int) -> Iterator[list[int]]:
    """Powers of two of them, the first ones as many as may be."""
    start = 0
    while rest := len(chunks) - start:
        size = min(at_a_time, 1 << rest.bit_length() - 1)
        yield chunks[start : start + size]
        start += size


def _first_block(position: int, window: int | None) -> int:
    """The first key of the first block of keys that a query sees something of."""
    return first_seen(position, window) // _KEY_BLOCK * _KEY_BLOCK
