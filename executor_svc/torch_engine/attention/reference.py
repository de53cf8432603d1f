"""Attention as its definition says it: gather all keys, one softmax, in float32.

For tests, and for whoever wants to know what the other backends have to compute. Slow: it walks
the chunks one by one and makes the whole matrix of scores.
"""

import torch
from torch import Tensor

from executor_svc.torch_engine.attention.base import StepLayout
from executor_svc.torch_engine.kv_cache import PagedKVCache, kv_slots
from executor_svc.torch_engine.windows import Windows


class ReferenceAttention:
    """softmax(q k^T / sqrt(head_dim)) v, where a query sees itself and what is before it.

    A layer's window hides what lies further back.
    """

    name = "reference"
    numerics = "reference"
    supports_graphs = False
    can_replay = False
    paged = None

    def __init__(self, cache: PagedKVCache, *, windows: Windows) -> None:
        self._cache, self._windows = cache, windows
        self._layout = StepLayout((), (), (), torch.empty(0, dtype=torch.int64))

    def plan(self, layout: StepLayout) -> None:
        self._layout = layout

    def run(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = self._layout
        num_tokens = layout.kv_slot_mapping.shape[0]
        self._cache.write(layer_index, layout.kv_slot_mapping, k[:num_tokens], v[:num_tokens])
        keys = self._cache.keys[layer_index].flatten(0, 1)  # [slots, kv_heads, head_dim]
        values = self._cache.values[layer_index].flatten(0, 1)
        out = torch.zeros_like(q)
        end = 0
        for query_len, context, table in zip(
            layout.query_lens, layout.context_lens, layout.block_tables, strict=True
        ):
            start, end = end, end + query_len
            if context == 0:
                continue  # a dummy
            slots = torch.from_numpy(kv_slots(table, 0, context, self._cache.block_size))
            slots = slots.to(q.device)
            window = self._windows[layer_index]
            attended = attend(q[start:end], keys[slots], values[slots], window)
            out[start:end] = attended.to(q.dtype)
        return out.flatten(1)


def attend(q: Tensor, keys: Tensor, values: Tensor, window: int | None = None) -> Tensor:
    """The queries are the last of the tokens whose keys and values are given; float32.

    Each sees itself and all before it, or with a window the last ``window`` of these. q and the
    result are [queries, heads, head_dim], keys and values [tokens, kv_heads, head_dim].
    """
    num_queries, num_heads, head_dim = q.shape
    num_tokens, num_kv_heads, _ = keys.shape
    queries = q.float().unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    scores = torch.einsum("qhgd,khd->hgqk", queries, keys.float()) * head_dim**-0.5
    positions = torch.arange(num_tokens, device=q.device)
    last_seen = positions[num_tokens - num_queries :, None]
    is_hidden = positions > last_seen
    if window is not None:
        is_hidden |= positions <= last_seen - window
    weights = scores.masked_fill_(is_hidden, -torch.inf).softmax(-1)
    return torch.einsum("hgqk,khd->qhgd", weights, values.float()).flatten(1, 2)
