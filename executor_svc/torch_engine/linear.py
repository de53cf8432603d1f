"""Matrix products with a model's weights.

Exactness: on CPU a row's result must not depend on the other rows of a step. Elementwise work
and reductions over the last dimension are so by nature. Matrix products are so only for some
numbers of rows: oneDNN's packed product from 2 rows on, MKL's for multiples of 4 (measured).
``row_multiple`` says to what number the caller has to pad; see ``pad_rows``.

Memory: oneDNN compiles a product for each number of rows that it meets, a millisecond and up to a
megabyte for each shape of weight, and keeps most of that for good. So a CPU sees few numbers of
rows.
"""

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

_ZERO_POINT = 128  # oneDNN takes unsigned inputs
_LEAST_SCALE = 1e-20  # for rows and outputs that are all 0
_ROWS_AT_A_TIME = 4096  # of a weight that is made narrow: a wide copy of a head is large


class Linear(Protocol):
    """``x @ weight.T + bias``."""

    row_multiple: int

    def __call__(self, x: Tensor) -> Tensor:  # [rows, in] -> [rows, out]
        ...


def make_linear(
    weight: Tensor, bias: Tensor | None = None, *, quantization: str = "none"
) -> Linear:
    """The fastest way to multiply with this weight [out, in] where it is."""
    if quantization == "int8":
        return Int8Linear(weight, bias)
    kind = PackedLinear if _can_pack(weight.device.type, weight.dtype) else PlainLinear
    return kind(weight, bias)


class PlainLinear:
    """As torch does it."""

    row_multiple = 8

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:  # [out, in], [out]
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """With the weight packed for oneDNN: on CPU 1.4 to 3 times as fast, for any number of rows."""

    row_multiple = 2

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:  # [out, in], [out]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


class Int8Linear:
    """With weights of 8 bits, a scale for each output, and inputs of 8 bits, a scale for each row.

    Half the memory of bfloat16 and 1.4 times its speed on a CPU, for about 1 % of error in each
    product. Whole numbers add up exactly, so a row never depends on its company. ValueError if this
    CPU does not compute such products exactly.
    """

    row_multiple = 1

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:  # [out, in], [out]
        if not _has_exact_int8():
            raise ValueError("quantization: this CPU has no exact products of 8 bits")
        scales = _scales(weight)
        narrow = torch.empty(weight.shape, dtype=torch.int8)
        for i in range(0, len(weight), _ROWS_AT_A_TIME):
            rows = slice(i, i + _ROWS_AT_A_TIME)
            narrow[rows] = (weight[rows] / scales[rows]).round_()
        self._product = _Int8Product(narrow, scales.flatten())
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        scales = _scales(x)
        # Adding a half and cutting is rounding, as all numbers are positive by then.
        narrow = (x / scales).add_(_ZERO_POINT + 0.5).to(torch.uint8)
        out = (self._product(narrow) * scales).to(x.dtype)
        return out if self._bias is None else out + self._bias


def _scales(x: Tensor) -> Tensor:  # [rows, in] -> float32 [rows, 1]
    """What 1 of 127 stands for in each row."""
    return x.abs().amax(-1, keepdim=True).float().clamp_min_(_LEAST_SCALE).div_(127)


class _Int8Product:
    """``(x - 128) @ weight.T * scales`` in oneDNN, with the weight packed for it."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:  # int8 [out, in], [out]
        self._weight = torch.ops.onednn.qlinear_prepack(weight, [8, weight.shape[1]])
        self._scales = scales
        self._zero_points = torch.zeros(len(scales), dtype=torch.int64)

    def __call__(self, x: Tensor) -> Tensor:  # uint8 [rows, in] -> float32 [rows, out]
        return torch.ops.onednn.qlinear_pointwise(
            *(x, 1.0, _ZERO_POINT),
            *(self._weight, self._scales, self._zero_points, None),
            *(1.0, 0, torch.float32),
            *("none", [], ""),
        )


@cache
def _has_exact_int8() -> bool:
    """Without VNNI, sums of two products of 8 bits may be cut off at 16: ask it for the largest."""
    try:
        product = _Int8Product(torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16))
        result = product(torch.full((2, 64), 255, dtype=torch.uint8))
    except (RuntimeError, AttributeError):
        return False
    return bool((result == 64 * 127 * 127).all())


@cache
def _can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """oneDNN takes CPU weights only, and bfloat16 only on some CPUs: ask it with a small one."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    ones = torch.ones(16, 16, dtype=dtype)
    try:
        PackedLinear(ones)(ones)
    except (RuntimeError, AttributeError):
        return False
    return True


def pad_rows(x: Tensor, multiple: int) -> Tensor:  # [rows, ...] -> [padded rows, ...]
    """Append zero rows until the number of rows is a multiple, and on a CPU one of few."""
    num_rows = x.shape[0]
    if x.device.type == "cpu":
        multiple = max(multiple, _cpu_row_step(num_rows))
    missing = -num_rows % multiple
    return x if missing == 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def _cpu_row_step(num_rows: int) -> int:
    """8 numbers between a power of two and the next one, so that padding is a ninth at most."""
    return 1 << max(0, (num_rows - 1).bit_length() - 4)
