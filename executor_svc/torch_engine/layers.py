"""Norms and positions, which all decoders here share.

What is written in torch here is the definition. On a GPU a kernel of our own does the same at once,
imported where it is called, since only CUDA's torch brings Triton.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from executor_svc.torch_engine.config import Llama3Scaling


class RMSNorm:
    """Root mean square norm over the last dimension, computed in float32.

    Each of several heads may have a weight of its own; not on a GPU.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:  # [dim] or [heads, dim]
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:  # [..., dim]
        if x.is_cuda:
            from executor_svc.torch_engine.kernels.elementwise import rms_norm

            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight

    def of_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [rows, dim] each
        """The norm of x + y, and x + y."""
        if x.is_cuda:
            from executor_svc.torch_engine.kernels.elementwise import add_rms_norm

            return add_rms_norm(x, y, self.weight, self.eps)
        total = x + y
        return self(total), total


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
        if x.is_cuda:
            from executor_svc.torch_engine.kernels.elementwise import rotate

            return rotate(x, cos, sin)
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
