"""The decoder that Qwen3 and Llama share; they differ in the norm on queries and keys.

Each class takes its tensors from a ``take(name)`` function, so the weights are read layer by
layer and nothing is held twice. ``tensor_shapes`` says what a checkpoint has to contain.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from executor_svc.torch_engine.attention.base import AttentionBackend
from executor_svc.torch_engine.config import ModelSpec
from executor_svc.torch_engine.layers import Linear, RMSNorm, Rotary, pad_rows

Take = Callable[[str], Tensor]


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint."""
    hidden, mlp = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    if spec.has_qk_norm:
        layer["self_attn.q_norm"] = layer["self_attn.k_norm"] = (spec.head_dim,)
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(spec.num_layers)
        for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = (spec.vocab_size, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not spec.has_tied_head:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


class Attention:
    """Grouped-query attention with rotary positions; Qwen3 also norms each query and key head."""

    def __init__(self, spec: ModelSpec, take: Take, layer_index: int) -> None:
        self._spec, self._layer_index = spec, layer_index
        self._qkv = Linear(torch.cat([take(f"{name}_proj.weight") for name in "qkv"]))
        self._out = Linear(take("o_proj.weight"))
        self._q_norm = self._k_norm = None
        if spec.has_qk_norm:
            self._q_norm = RMSNorm(take("q_norm.weight"), spec.rms_norm_eps)
            self._k_norm = RMSNorm(take("k_norm.weight"), spec.rms_norm_eps)

    def __call__(  # x [rows, hidden], angles [rows, 1, head_dim / 2] each
        self, x: Tensor, angles: tuple[Tensor, Tensor], backend: AttentionBackend
    ) -> Tensor:
        spec = self._spec
        heads = self._qkv(x).view(x.shape[0], -1, spec.head_dim)
        q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(q), self._k_norm(k)
        q, k = Rotary.apply(q, *angles), Rotary.apply(k, *angles)
        return self._out(backend.run(self._layer_index, q, k, v))


class Mlp:
    """SwiGLU feed-forward."""

    def __init__(self, take: Take) -> None:
        self._gate_up = Linear(torch.cat([take("gate_proj.weight"), take("up_proj.weight")]))
        self._down = Linear(take("down_proj.weight"))

    def __call__(self, x: Tensor) -> Tensor:  # [rows, hidden]
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(F.silu(gate) * up)


class Layer:
    """One decoder layer: attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, spec: ModelSpec, take: Take, layer_index: int) -> None:
        self._attention_norm = RMSNorm(take("input_layernorm.weight"), spec.rms_norm_eps)
        self._attention = Attention(spec, lambda name: take(f"self_attn.{name}"), layer_index)
        self._mlp_norm = RMSNorm(take("post_attention_layernorm.weight"), spec.rms_norm_eps)
        self._mlp = Mlp(lambda name: take(f"mlp.{name}"))

    def __call__(
        self, x: Tensor, angles: tuple[Tensor, Tensor], backend: AttentionBackend
    ) -> Tensor:
        x = x + self._attention(self._attention_norm(x), angles, backend)
        return x + self._mlp(self._mlp_norm(x))


class Decoder:
    """A whole model, on one device, for inference only."""

    def __init__(self, spec: ModelSpec, take: Take, device: torch.device) -> None:
        self._rotary = Rotary(spec.head_dim, spec.rope_theta, spec.rope_scaling, device)
        self._embedding = take("model.embed_tokens.weight")
        self._layers = [_layer(spec, take, i) for i in range(spec.num_layers)]
        self._norm = RMSNorm(take("model.norm.weight"), spec.rms_norm_eps)
        self._head = Linear(self._embedding if spec.has_tied_head else take("lm_head.weight"))
        self._row_multiple = self._head.row_multiple

    def forward(  # token_ids [tokens], positions [tokens]
        self, token_ids: Tensor, positions: Tensor, backend: AttentionBackend
    ) -> Tensor:
        """Hidden states [at least tokens, hidden]; the backend was planned for this step."""
        x = F.embedding(pad_rows(token_ids, self._row_multiple), self._embedding)
        angles = self._rotary.angles(pad_rows(positions, self._row_multiple))
        for layer in self._layers:
            x = layer(x, angles, backend)
        return x

    def logits(self, hidden: Tensor) -> Tensor:  # [rows, hidden] -> [rows, vocab]
        """Logits of some rows of what ``forward`` gave."""
        padded = pad_rows(hidden, self._row_multiple)
        return self._head(self._norm(padded))[: hidden.shape[0]]


def _layer(spec: ModelSpec, take: Take, layer_index: int) -> Layer:
    return Layer(spec, lambda name: take(f"model.layers.{layer_index}.{name}"), layer_index)
