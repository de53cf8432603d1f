"""The tensors that hold keys and values.

Position p of a sequence lives at slot ``block_table[p // block_size] * block_size +
p % block_size``. There are two layouts:

- ``KVCache``, for the CPU: head-major, so that one gather by position gives each head a contiguous
  [tokens, dim] matrix. One more slot, the null slot, stays zero for ever: padding reads it. Padding
  must not read a stale slot, since zero weight times a stale NaN would still be NaN;
- ``PagedKVCache``, for GPUs: block after block, as FlashAttention reads it.

No slot but the null slot is read before it is written, so nothing else is cleared: that would cost
most of a model's switch.
"""

import numpy as np
import torch
from torch import Tensor

from executor_svc.torch_engine.config import EngineConfig, ModelSpec

_DEFAULT_CPU_KV_BYTES = 1 << 30


class KVCache:
    """Keys and values of all layers, each [layers, kv_heads, slots + 1, head_dim].

    Raises ValueError if there is no memory for them.
    """

    def __init__(
        self, spec: ModelSpec, *, num_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.null_slot = num_blocks * block_size
        shape = (spec.num_layers, spec.num_kv_heads, self.null_slot + 1, spec.head_dim)
        self.keys = torch.empty(shape, dtype=spec.dtype, device=device)
        self.values = torch.empty(shape, dtype=spec.dtype, device=device)
        self.keys[:, :, self.null_slot] = 0
        self.values[:, :, self.null_slot] = 0

    def write(self, layer_index: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values, each [tokens, kv_heads, head_dim], at ``slots`` [tokens]."""
        self.keys[layer_index].index_copy_(1, slots, k.transpose(0, 1))
        self.values[layer_index].index_copy_(1, slots, v.transpose(0, 1))


class PagedKVCache:
    """Keys and values of all layers, each [layers, blocks, block_size, kv_heads, head_dim]."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def write(self, layer_index: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values, each [tokens, kv_heads, head_dim], at ``slots`` [tokens]."""
        self.keys[layer_index].flatten(0, 1).index_copy_(0, slots, k)
        self.values[layer_index].flatten(0, 1).index_copy_(0, slots, v)


def kv_slots(block_table: list[int], start: int, end: int, block_size: int) -> np.ndarray:
    """Slots of the positions [start, end) of a sequence, int64 [end - start]."""
    positions = np.arange(start, end, dtype=np.int64)
    blocks = np.asarray(block_table, dtype=np.int64)[positions // block_size]
    return blocks * block_size + positions % block_size


def kv_bytes_per_model(
    config: EngineConfig, device: torch.device, *, num_models: int, weight_bytes: int
) -> int:
    """Memory for the cache of each of ``num_models`` models, none of which is on the device yet.

    ``weight_bytes`` is what the weights of the largest one will take.
    """
    if config.kv_bytes is not None:
        return config.kv_bytes // num_models
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        num_bytes = int(total * config.gpu_memory_utilization) - (total - free)
        return num_bytes // num_models - weight_bytes
    return _DEFAULT_CPU_KV_BYTES // num_models


def count_blocks(config: EngineConfig, spec: ModelSpec, kv_bytes: int) -> int:
    """How many blocks a model's cache of at most ``kv_bytes`` gets."""
    if config.num_blocks is not None:
        return config.num_blocks
    block_bytes = spec.kv_bytes_per_token * config.block_size
    # More than all seats filled to the last position is never used.
    context = min(spec.max_context_tokens, config.max_model_len or spec.max_context_tokens)
    most = config.max_num_seqs * -(-context // config.block_size)
    num_blocks = min(kv_bytes // block_bytes, most)
    if num_blocks < 1:
        raise ValueError(f"kv_bytes: {kv_bytes} do not hold one block of {block_bytes} bytes")
    return num_blocks
