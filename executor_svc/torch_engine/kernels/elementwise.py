"""The memory-bound pieces between matrix products, one kernel each instead of half a dozen.

They round where ``layers.py`` does, so they are its equals up to the order of one sum: the squares
of a row. That order is fixed by the row's length, so a row does not depend on its company. Sums and
products of half types are made in float32 and rounded, which is what the hardware does with them.
All take CUDA tensors (CPU ones in Triton's interpreter) whose rows are contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

_ROTATED_HEADS = 4  # of one program


@triton.jit
def _product(a, b):
    """a b, rounded to a's type."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)


@triton.jit
def _sum(a, b):
    """a + b, rounded to a's type."""
    return (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)


@triton.jit
def _difference(a, b):
    """a - b, rounded to a's type."""
    return (a.to(tl.float32) - b.to(tl.float32)).to(a.dtype)


@triton.jit
def _rms_norm_kernel(
    out,
    x,
    y,
    total,  # gets x + y
    weight,
    x_stride,
    eps,
    IS_SUM: tl.constexpr,
    DIM,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, PADDED)
    is_in = dims < DIM
    values = tl.load(x + row * x_stride + dims, mask=is_in, other=0.0)
    if IS_SUM:
        values = _sum(values, tl.load(y + row * DIM + dims, mask=is_in, other=0.0))
        tl.store(total + row * DIM + dims, values, mask=is_in)
    wide = values.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    scaled = _product(wide.to(values.dtype), tl.load(weight + dims, mask=is_in, other=0.0))
    tl.store(out + row * DIM + dims, scaled, mask=is_in)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension; x is [..., dim], weight [dim]."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape)
    _norm(out, rows, None, weight, eps)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + y, and x + y; both are contiguous [rows, dim]."""
    assert x.is_contiguous()
    assert y.is_contiguous()
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _norm(out, x, (y, total), weight, eps)
    return out, total


def _norm(
    out: Tensor, x: Tensor, sum_of: tuple[Tensor, Tensor] | None, weight: Tensor, eps: float
) -> None:
    num_rows, dim = x.shape
    padded = triton.next_power_of_2(dim)
    y, total = sum_of or (x, out)  # not looked at without a sum
    _rms_norm_kernel[(num_rows,)](
        out,
        x,
        y,
        total,
        weight,
        x.stride(0),
        eps,
        IS_SUM=sum_of is not None,
        DIM=dim,
        PADDED=padded,
        num_warps=min(8, max(1, padded // 256)),
    )


@triton.jit
def _silu_mul_kernel(out, gate_up, stride, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = columns < WIDTH
    gate = tl.load(gate_up + row * stride + columns, mask=is_in, other=0.0)
    up = tl.load(gate_up + row * stride + WIDTH + columns, mask=is_in, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * WIDTH + columns, _product(silu, up), mask=is_in)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half of each row times the second half; [rows, 2 * n] to [rows, n]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    block = 1024
    _silu_mul_kernel[(num_rows, triton.cdiv(width, block))](
        out, gate_up, gate_up.stride(0), WIDTH=width, BLOCK=block, num_warps=4
    )
    return out


@triton.jit
def _rotate_kernel(
    out,
    x,
    cos,
    sin,
    row_stride,
    num_heads,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, PADDED)
    is_in = (heads < num_heads)[:, None] & (dims < HALF)[None, :]
    offsets = heads[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(x + row * row_stride + offsets, mask=is_in)
    second = tl.load(x + row * row_stride + HALF + offsets, mask=is_in)
    dtype = first.dtype
    c = tl.load(cos + row * HALF + dims, mask=dims < HALF).to(dtype)[None, :]
    s = tl.load(sin + row * HALF + dims, mask=dims < HALF).to(dtype)[None, :]
    out += row * num_heads * 2 * HALF
    tl.store(out + offsets, _difference(_product(first, c), _product(second, s)), mask=is_in)
    tl.store(out + HALF + offsets, _sum(_product(second, c), _product(first, s)), mask=is_in)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; x is [rows, heads, head_dim], cos and sin [rows, 1, head_dim / 2]."""
    num_rows, num_heads, head_dim = x.shape
    assert x.stride(1) == head_dim
    out = x.new_empty(x.shape)
    _rotate_kernel[(num_rows, triton.cdiv(num_heads, _ROTATED_HEADS))](
        out,
        x,
        cos,
        sin,
        x.stride(0),
        num_heads,
        HALF=head_dim // 2,
        PADDED=triton.next_power_of_2(head_dim // 2),
        HEADS=_ROTATED_HEADS,
        num_warps=1,
    )
    return out
