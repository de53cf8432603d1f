"""How the CPU attends: torch's fused attention, or two batched products in bfloat16.

Fused attention (FlashAttention, Dao 2022) makes a matrix product for each kv head of each sequence,
and calling a library that often costs more than the products: in a decode step of 32 sequences
three quarters of the time. Batched products are one call each. Their result is rounded to bfloat16,
which is too coarse for a score that goes into an exponential, so what the rounding took is computed
by a second product and added.

Exactness: products give a row the same bits for any number of rows and batches, and for any number
of keys past those that it sees (measured, tested). Fused attention merges keys in blocks of 512,
with float32 sums, and its products cut a sum over more than 192 keys in halves, and over more than
384 at 192 and on; so a last block has one of some widths. From 192 rows on its blocks of queries
grow, and products with fewer than 4 take another path.

Memory: oneDNN compiles a product for each shape that it meets, half a millisecond and 0.6 MB, and
never forgets it: its cache of primitives has a limit, but most of their code is kept beside that
(measured). So there must be few shapes: rows and widths are padded to few numbers, and who calls
takes chunks in powers of two, see cpu.py.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

_FUSED_KEY_BLOCK = 512  # torch's own
_FUSED_WIDTHS = (64, 128, 192, 384, 512)
_WIDTH_MULTIPLE = 64
_ROW_MULTIPLE = 4
_MAX_SCORES = 1 << 22  # of a pass; 4 bytes each


class Attend(Protocol):
    """Attention of folded queries to the keys that a mask lets them see."""

    numerics: str
    mask_dtype: torch.dtype

    def width(self, num_keys: int) -> int:
        """How many keys a call takes, for some that have to be seen."""
        ...

    def rows(self, num_rows: int) -> int:
        """How many rows a call takes, for some that are wanted."""
        ...

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The result has the shape of ``queries``, [kv_heads, chunks, rows, head_dim].

        Keys and values are [kv_heads, chunks, width, head_dim]; the mask is 0 or -inf,
        [1, chunks, rows or 1, width].
        """
        ...


class FusedAttend:
    """As torch does it."""

    numerics = f"fused widths={_FUSED_WIDTHS}"

    def __init__(self, dtype: torch.dtype) -> None:
        self.mask_dtype = dtype

    def width(self, num_keys: int) -> int:
        blocks, rest = divmod(num_keys, _FUSED_KEY_BLOCK)
        last = next(width for width in (0, *_FUSED_WIDTHS) if width >= rest)
        return blocks * _FUSED_KEY_BLOCK + last

    def rows(self, num_rows: int) -> int:
        return num_rows + -num_rows % _ROW_MULTIPLE

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


class ProductAttend:
    """With products of bfloat16, which oneDNN has to offer."""

    numerics = "products"
    mask_dtype = torch.float32

    def width(self, num_keys: int) -> int:
        """A multiple of 64, and one of 4 between a power of two and the next one."""
        return _round_up(num_keys, _WIDTH_MULTIPLE, num_steps=4)

    def rows(self, num_rows: int) -> int:
        """A power of two from 4 on."""
        return _round_up(num_rows, _ROW_MULTIPLE, num_steps=1)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        num_heads, num_chunks, num_rows, _ = queries.shape
        heads_at_a_time = max(1, _MAX_SCORES // (num_chunks * num_rows * keys.shape[2]))
        if heads_at_a_time >= num_heads:
            return self._pass(queries, keys, values, mask)
        parts = zip(*(x.split(heads_at_a_time) for x in (queries, keys, values)), strict=True)
        return torch.cat([self._pass(q, k, v, mask) for q, k, v in parts])

    def _pass(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        num_heads, num_chunks, num_rows, head_dim = queries.shape
        q, v = queries.flatten(0, 1), values.flatten(0, 1)
        k = keys.flatten(0, 1).contiguous().transpose(1, 2)
        rounded = torch.bmm(q, k)
        rest = torch.baddbmm(rounded, q, k, beta=-1)
        shape, scale = (num_heads, num_chunks, num_rows, -1), 1 / math.sqrt(head_dim)
        scores = torch.add(mask, rounded.view(shape), alpha=scale)
        scores.add_(rest.view(shape), alpha=scale)
        shares = scores.softmax(-1).to(q.dtype)
        return torch.bmm(shares.flatten(0, 1), v).view(queries.shape)


def choose_attend(dtype: torch.dtype) -> Attend:
    """The fastest way that keeps bits on this CPU."""
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ProductAttend()
    return FusedAttend(dtype)


def _round_up(count: int, multiple: int, *, num_steps: int) -> int:
    """To a multiple, and to one of ``num_steps`` from a power of two to the next one."""
    power = 1 << (count - 1).bit_length()  # the next one
    step = max(multiple, power // (2 * num_steps))
    return count + -count % step
