"""Everything between the product for q, k and v and attention, in one pass.

Norms the heads of queries and keys (where the family has such norms), turns them by their
positions, and stores keys and values in the cache: five launches in one, and keys and values are
not written to memory and read back on their way. Rounds where ``layers.py`` does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.torch_engine.kernels.elementwise import _difference, _product, _sum

_HEADS = 4  # of one program


@triton.jit
def _normed(first, second, weight, offset, is_dim, eps, HALF: tl.constexpr):
    """Heads, as two halves [heads, PADDED] each, normed; ``weight`` [heads, 1] points to theirs."""
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    squares = tl.sum(wide_first * wide_first, 1) + tl.sum(wide_second * wide_second, 1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    first_weight = tl.load(weight + offset, mask=is_dim, other=0.0)
    second_weight = tl.load(weight + HALF + offset, mask=is_dim, other=0.0)
    first = _product((wide_first * scale).to(first.dtype), first_weight)
    return first, _product((wide_second * scale).to(second.dtype), second_weight)


@triton.jit
def _rotate_store_kernel(
    q_out,  # [rows, num_q, 2 * HALF]
    heads,  # [rows, num_q + 2 * num_kv, 2 * HALF]: queries, keys, values
    cos,  # [rows, HALF]
    sin,
    slots,  # [tokens]
    keys,  # [slots, num_kv, 2 * HALF]; values likewise
    values,
    q_weight,  # [2 * HALF]; k_weight likewise
    k_weight,
    row_stride,
    num_tokens,
    num_q,
    num_kv,
    eps,
    HAS_NORM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    dims = tl.arange(0, PADDED)[None, :]
    is_dim = (head < num_q + 2 * num_kv) & (dims < HALF)
    is_q, is_v = head < num_q, head >= num_q + num_kv
    offsets = row * row_stride + head * (2 * HALF) + dims
    plain_first = tl.load(heads + offsets, mask=is_dim, other=0.0)
    plain_second = tl.load(heads + HALF + offsets, mask=is_dim, other=0.0)
    first, second = plain_first, plain_second
    if HAS_NORM:
        weight = tl.where(is_q, q_weight, k_weight)
        first, second = _normed(first, second, weight, dims, is_dim, eps, HALF)
    c = tl.load(cos + row * HALF + dims, mask=dims < HALF, other=0.0).to(first.dtype)
    s = tl.load(sin + row * HALF + dims, mask=dims < HALF, other=0.0).to(first.dtype)
    turned_first = _difference(_product(first, c), _product(second, s))
    turned_second = _sum(_product(second, c), _product(first, s))
    q_offsets = (row * num_q + head) * (2 * HALF) + dims
    tl.store(q_out + q_offsets, turned_first, mask=is_dim & is_q)
    tl.store(q_out + HALF + q_offsets, turned_second, mask=is_dim & is_q)
    slot = tl.load(slots + row, mask=row < num_tokens, other=-1).to(tl.int64)
    is_stored = is_dim & (slot >= 0)
    k_offsets = (slot * num_kv + head - num_q) * (2 * HALF) + dims
    is_k = is_stored & (head >= num_q) & (head < num_q + num_kv)
    tl.store(keys + k_offsets, turned_first, mask=is_k)
    tl.store(keys + HALF + k_offsets, turned_second, mask=is_k)
    v_offsets = k_offsets - num_kv * (2 * HALF)
    tl.store(values + v_offsets, plain_first, mask=is_stored & is_v)
    tl.store(values + HALF + v_offsets, plain_second, mask=is_stored & is_v)


def rotate_and_store(
    heads: Tensor,
    num_q: int,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor, float] | None,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Store keys and values at ``slots`` [tokens]; gives the queries [rows, num_q, head_dim].

    ``heads`` is [rows, num_q + 2 * kv_heads, head_dim]: queries, keys, values. ``angles`` are
    cosines and sines, [rows, 1, head_dim / 2] each; ``norms`` the weights of queries' and keys'
    heads, [head_dim] each, and their epsilon. keys and values are one layer of a cache: [blocks,
    block_size, kv_heads, head_dim]. Rows past the tokens are padding; a negative slot stores
    nothing.
    """
    num_rows, num_heads, head_dim = heads.shape
    assert heads.stride(1) == head_dim
    assert heads.stride(2) == 1
    q_out = torch.empty(num_rows, num_q, head_dim, dtype=heads.dtype, device=heads.device)
    q_weight, k_weight, eps = norms or (heads, heads, 0.0)  # not looked at without norms
    _rotate_store_kernel[(num_rows, triton.cdiv(num_heads, _HEADS))](
        q_out,
        heads,
        *angles,
        slots,
        keys,
        values,
        q_weight,
        k_weight,
        heads.stride(0),
        len(slots),
        num_q,
        (num_heads - num_q) // 2,
        eps,
        HAS_NORM=norms is not None,
        HALF=head_dim // 2,
        PADDED=triton.next_power_of_2(head_dim // 2),
        HEADS=_HEADS,
        num_warps=1,
    )
    return q_out
