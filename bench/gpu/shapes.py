"""The models that are measured, how much of everything, and what their steps cost at the least."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from executor_svc.torch_engine.config import ModelSpec
from executor_svc.torch_engine.models.tensors import tensor_shapes

Figures = dict[str, Any]

_VOCAB_SIZE = 151_936


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, is_tied: bool) -> ModelSpec:
    return ModelSpec(
        family="qwen3",
        vocab_size=_VOCAB_SIZE if hidden > 64 else 512,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8 if heads > 8 else 2,
        head_dim=128 if hidden > 64 else 16,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_context_tokens=40_960,
        windows=(None,) * layers,
        has_qk_norm=True,
        has_qkv_bias=False,
        experts=None,
        has_tied_head=is_tied,
        dtype=torch.bfloat16,
        eos_token_ids=(),
    )


SHAPES = {
    "qwen3-0.6b": _qwen3(1_024, 3_072, 28, 16, is_tied=True),
    "qwen3-8b": _qwen3(4_096, 12_288, 36, 32, is_tied=False),
    "tiny": _qwen3(64, 128, 2, 4, is_tied=True),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything; the lengths are numbers of tokens."""

    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    context: int = 1_024
    prompts: tuple[int, ...] = (1_024, 8_192)
    num_steps: int = 20
    copy_bytes: int = 4 << 30
    product: int = 8_192
    max_rows: int = 512
    requests: int = 32
    output: int = 128


QUICK = Scale((1, 2), 40, (40,), 2, 1 << 20, 64, 20, 2, 3)
BUDGET = 2_048  # tokens of a step


def random_tensors(spec: ModelSpec, device: torch.device) -> Callable[[str], Tensor]:
    """Tensors of a checkpoint, such that its logits stay finite."""
    shapes = tensor_shapes(spec)

    def take(name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=spec.dtype, device=device)
        return torch.randn(shapes[name], dtype=spec.dtype, device=device) * 0.02

    return take


def step_bytes(spec: ModelSpec, batch: int, context: int) -> int:
    """What a decode step has to read: weights, keys and values."""
    return num_multiplied(spec) * spec.dtype.itemsize + batch * context * spec.kv_bytes_per_token


def num_multiplied(spec: ModelSpec) -> int:
    """Weights that each token meets in a product, the head included."""
    shapes = tensor_shapes(spec)
    products = sum(a * b for a, b in (s for n, s in shapes.items() if n.endswith("proj.weight")))
    return products + spec.vocab_size * spec.hidden_size


def product_shapes(spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs of the products of a layer, and of the head."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return (
        (q_size + 2 * kv_size, hidden),
        (hidden, q_size),
        (2 * inner, hidden),
        (hidden, inner),
        (spec.vocab_size, hidden),
    )


def prefill_operations(spec: ModelSpec, num_tokens: int) -> float:
    """Of a prompt's products and causal attention; only the last token meets the head."""
    products = 2 * num_tokens * (num_multiplied(spec) - spec.vocab_size * spec.hidden_size)
    return products + 2.0 * spec.num_layers * spec.num_heads * spec.head_dim * num_tokens**2
