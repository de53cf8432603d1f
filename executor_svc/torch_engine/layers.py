"""The parts of a decoder.

Exactness: on CPU a row's result must not depend on the other rows of a step. Elementwise work
and reductions over the last dimension are so by nature. Matrix products are so only for some
numbers of rows: oneDNN's packed product from 2 rows on, MKL's for multiples of 4 (measured).
``Linear.row_multiple`` says to what number the caller has to pad; see ``pad_rows``.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from executor_svc.torch_engine.config import Llama3Scaling


class Linear:
    """``x @ weight.T``, with the weight packed for oneDNN where that is possible."""

    def __init__(self, weight: Tensor) -> None:  # [out, in]
        self._is_packed = _can_pack(weight)
        self._weight = weight
        if self._is_packed:
            # 1.4 to 3 times faster than F.linear on CPU; one packing serves any number of rows.
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        self.row_multiple = 2 if self._is_packed else 8

    def __call__(self, x: Tensor) -> Tensor:  # [rows, in] -> [rows, out]
        if not self._is_packed:
            return F.linear(x, self._weight)
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")


def _can_pack(weight: Tensor) -> bool:
    """oneDNN takes CPU weights only, and bfloat16 only on some CPUs: ask it with a small one."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        small = torch.ops.mkldnn._reorder_linear_weight(weight.new_ones(16, 16), 8)
        torch.ops.mkldnn._linear_pointwise(weight.new_ones(2, 16), small, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return False
    return True


def pad_rows(x: Tensor, multiple: int) -> Tensor:  # [rows, ...] -> [padded rows, ...]
    """Append zero rows until the number of rows is a multiple."""
    missing = -x.shape[0] % multiple
    return x if missing == 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


class RMSNorm:
    """Root mean square norm over the last dimension, computed in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:  # [dim]
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:  # [..., dim]
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return wide.to(x.dtype) * self._weight


class Rotary:
    """Rotary position embedding in the half-split layout that Hugging Face checkpoints use."""

    def __init__(
        self, head_dim: int, theta: float, scaling: Llama3Scaling | None, device: torch.device
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponents
        if scaling is not None:
            frequencies = _llama3_frequencies(frequencies, scaling)
        self._frequencies = frequencies.to(device)  # [head_dim / 2]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:  # [rows]
        """Cosines and sines for one step, each [rows, 1, head_dim / 2]."""
        angles = positions[:, None, None].float() * self._frequencies
        return angles.cos(), angles.sin()

    @staticmethod
    def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [rows, heads, head_dim]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:  # [head_dim / 2]
    """Llama 3.1's rule: keep fast frequencies, divide slow ones, blend in between.

    Formula: transformers, ``_compute_llama3_parameters``.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)
