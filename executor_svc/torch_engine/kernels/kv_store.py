"""Puts the keys and values of new tokens into their slots of a paged cache."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store_kernel(
    k,  # [rows, width]; v likewise
    v,
    slots,  # [tokens]
    keys,  # [slots, width]; values likewise
    values,
    k_stride,
    v_stride,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    offsets = tl.arange(0, PADDED)
    is_in = (offsets < WIDTH) & (slot >= 0)
    key = tl.load(k + token.to(tl.int64) * k_stride + offsets, mask=is_in)
    tl.store(keys + slot * WIDTH + offsets, key, mask=is_in)
    value = tl.load(v + token.to(tl.int64) * v_stride + offsets, mask=is_in)
    tl.store(values + slot * WIDTH + offsets, value, mask=is_in)


def store_kv(k: Tensor, v: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store the rows of k and v at ``slots`` [tokens]; a negative slot stores nothing.

    k and v are [at least tokens, kv_heads, head_dim] with heads side by side, keys and values one
    layer of a cache: [blocks, block_size, kv_heads, head_dim].
    """
    width = k.shape[1] * k.shape[2]
    for x in (k, v):
        assert x.stride(1) == x.shape[2]
        assert x.stride(2) == 1
    if len(slots):
        _store_kernel[(len(slots),)](
            k,
            v,
            slots,
            keys,
            values,
            k.stride(0),
            v.stride(0),
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            num_warps=4,
        )
