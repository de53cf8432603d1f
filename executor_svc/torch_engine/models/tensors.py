"""The tensors of a checkpoint, and how a decoder takes them.

A decoder takes its tensors layer by layer from a ``take(name)`` function, so that nothing is held
twice. ``tensor_shapes`` says what a checkpoint has to contain.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from executor_svc.torch_engine.config import ModelSpec
from executor_svc.torch_engine.layers import RMSNorm
from executor_svc.torch_engine.linear import Linear, make_linear

Take = Callable[[str], Tensor]
Shape = tuple[int, ...]


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Names and shapes of all tensors of a checkpoint."""
    hidden = spec.hidden_size
    shapes: dict[str, Shape] = {
        f"model.layers.{i}.{name}": shape
        for i in range(spec.num_layers)
        for name, shape in _layer_shapes(spec, i).items()
    }
    shapes["model.embed_tokens.weight"] = (spec.vocab_size, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not spec.has_tied_head:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def _layer_shapes(spec: ModelSpec, layer_index: int) -> dict[str, Shape]:
    hidden, experts = spec.hidden_size, spec.experts
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
    }
    if spec.has_qkv_bias:
        shapes |= {f"self_attn.{name}_proj.bias": (kv_size,) for name in "kv"}
        shapes["self_attn.q_proj.bias"] = (q_size,)
    if spec.has_qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    if experts is None or layer_index not in experts.layers:
        return shapes | _mlp_shapes("mlp.", hidden, spec.intermediate_size)
    shapes["mlp.gate.weight"] = (experts.num_experts, hidden)
    for i in range(experts.num_experts):
        shapes |= _mlp_shapes(f"mlp.experts.{i}.", hidden, experts.intermediate_size)
    return shapes


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> dict[str, Shape]:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


class Weights:
    """The tensors under one prefix, as what the decoder makes of them."""

    def __init__(self, take: Take, prefix: str = "", *, quantization: str = "none") -> None:
        self._take, self._prefix, self._quantization = take, prefix, quantization

    def under(self, name: str) -> "Weights":
        """The tensors of a part."""
        return Weights(self._take, f"{self._prefix}{name}.", quantization=self._quantization)

    def tensor(self, *names: str) -> Tensor:
        """One tensor, or several one below the other."""
        tensors = [self._take(self._prefix + name) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def linear(self, *names: str, has_bias: bool = False) -> Linear:
        """The product with one weight, or with several at once."""
        weight = self.tensor(*(f"{name}.weight" for name in names))
        bias = self.tensor(*(f"{name}.bias" for name in names)) if has_bias else None
        return self.linear_of(weight, bias)

    def linear_of(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """The product with a weight [out, in] that was taken already."""
        return make_linear(weight, bias, quantization=self._quantization)

    def norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self.tensor(f"{name}.weight"), eps)
