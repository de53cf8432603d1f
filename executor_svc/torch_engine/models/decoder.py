"""The decoder that all families share; they differ in a norm, a bias, and experts.

It works on the tensors that it takes, whole ones or a rank's part of each: what is divided over
ranks is summed by ``Collectives.reduce`` after attention, after the feed-forward and after the
embedding, and joined by ``gather`` after the head.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from executor_svc.torch_engine.attention.base import AttentionBackend
from executor_svc.torch_engine.config import ModelSpec
from executor_svc.torch_engine.layers import RMSNorm, Rotary
from executor_svc.torch_engine.linear import pad_rows
from executor_svc.torch_engine.models.collectives import ALONE, Collectives
from executor_svc.torch_engine.models.experts import Experts, Mlp
from executor_svc.torch_engine.models.tensors import Take, Weights


@dataclass(frozen=True, slots=True)
class Step:
    """What is the same in all layers of a step; rows from ``num_tokens`` on are padding."""

    num_tokens: int
    angles: tuple[Tensor, Tensor]  # cosines and sines, [rows, 1, head_dim / 2] each
    backend: AttentionBackend


class Model(Protocol):
    """What runs the steps of a model: its decoder, or a rank that leads others."""

    def attach(self, backend: AttentionBackend) -> AttentionBackend:
        """The backend as ``forward`` wants it."""
        ...

    def forward(  # token_ids [tokens], positions [tokens]
        self, token_ids: Tensor, positions: Tensor, backend: AttentionBackend
    ) -> Tensor:
        """Hidden states [at least tokens, hidden]; the backend was planned for this step."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:  # [rows, hidden] -> [rows, vocab]
        """Logits of some rows of what ``forward`` gave."""
        ...


class Attention:
    """Grouped-query attention with rotary positions; Qwen3 also norms each query and key head."""

    def __init__(self, spec: ModelSpec, weights: Weights, layer_index: int) -> None:
        self._spec, self._layer_index = spec, layer_index
        self._qkv = weights.linear("q_proj", "k_proj", "v_proj", has_bias=spec.has_qkv_bias)
        self._out = weights.linear("o_proj")
        self._norms: tuple[Tensor, Tensor, float] | None = None  # of query and key heads
        self._norm: RMSNorm | None = None  # the same, of all these heads
        if spec.has_qk_norm:
            q, k = weights.tensor("q_norm.weight"), weights.tensor("k_norm.weight")
            self._norms = q, k, spec.rms_norm_eps
            both = torch.cat([q.expand(spec.num_heads, -1), k.expand(spec.num_kv_heads, -1)])
            self._norm = RMSNorm(both, spec.rms_norm_eps)

    def __call__(self, x: Tensor, step: Step) -> Tensor:  # [rows, hidden]
        spec = self._spec
        heads = self._qkv(x).view(x.shape[0], -1, spec.head_dim)
        if (paged := step.backend.paged) is not None:
            from executor_svc.torch_engine.kernels.rotate_store import rotate_and_store

            target = paged.target(self._layer_index)
            q = rotate_and_store(heads, spec.num_heads, step.angles, self._norms, *target)
            return self._out(paged.attend(self._layer_index, q))
        turned, v = heads.split([spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if self._norm is not None:
            turned = self._norm(turned)
        turned = Rotary.apply(turned, *step.angles)
        q, k = turned.split([spec.num_heads, spec.num_kv_heads], dim=1)
        return self._out(step.backend.run(self._layer_index, q, k, v))


class Layer:
    """One decoder layer: attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, layer_index: int, collectives: Collectives
    ) -> None:
        self._reduce = collectives.reduce
        self._attention_norm = weights.norm("input_layernorm", spec.rms_norm_eps)
        self._attention = Attention(spec, weights.under("self_attn"), layer_index)
        self._mlp_norm = weights.norm("post_attention_layernorm", spec.rms_norm_eps)
        self._mlp: Mlp | Experts
        if spec.experts is not None and layer_index in spec.experts.layers:
            self._mlp = Experts(spec.experts, weights.under("mlp"))
        else:
            self._mlp = Mlp(weights.under("mlp"))

    def __call__(self, x: Tensor, more: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """x + ``more`` is what comes in, the sum of the results what goes out; [rows, hidden].

        Sums are left to the norm behind them, which a GPU then makes in the same kernel.
        """
        if more is None:
            normed = self._attention_norm(x)
        else:
            normed, x = self._attention_norm.of_sum(x, more)
        attended = self._reduce(self._attention(normed, step))
        normed, x = self._mlp_norm.of_sum(x, attended)
        return x, self._reduce(self._mlp(normed, step.num_tokens))


class Decoder:
    """A whole model or a rank's part of it, on one device, for inference only."""

    def __init__(
        self,
        spec: ModelSpec,
        take: Take,
        device: torch.device,
        *,
        collectives: Collectives = ALONE,
        quantization: str = "none",
    ) -> None:
        weights = Weights(take, quantization=quantization)
        self._collectives = collectives
        self._rotary = Rotary(spec.head_dim, spec.rope_theta, spec.rope_scaling, device)
        self._embedding = weights.tensor("model.embed_tokens.weight")
        self._first_token_id = collectives.rank * self._embedding.shape[0]
        self._layers = [
            Layer(spec, weights.under(f"model.layers.{i}"), i, collectives)
            for i in range(spec.num_layers)
        ]
        self._norm = weights.norm("model.norm", spec.rms_norm_eps)
        head = self._embedding if spec.has_tied_head else weights.tensor("lm_head.weight")
        self._head = weights.linear_of(head)
        self._row_multiple = self._head.row_multiple

    def attach(self, backend: AttentionBackend) -> AttentionBackend:
        return backend

    def forward(self, token_ids: Tensor, positions: Tensor, backend: AttentionBackend) -> Tensor:
        x = self._embed(pad_rows(token_ids, self._row_multiple))
        angles = self._rotary.angles(pad_rows(positions, self._row_multiple))
        step = Step(token_ids.shape[0], angles, backend)
        more: Tensor | None = None
        for layer in self._layers:
            x, more = layer(x, more, step)
        assert more is not None
        return x + more

    def logits(self, hidden: Tensor) -> Tensor:
        padded = pad_rows(hidden, self._row_multiple)
        return self._collectives.gather(self._head(self._norm(padded))[: hidden.shape[0]])

    def _embed(self, token_ids: Tensor) -> Tensor:  # [rows] -> [rows, hidden]
        if self._collectives.size == 1:
            return F.embedding(token_ids, self._embedding)
        local = token_ids - self._first_token_id
        is_here = (local >= 0) & (local < self._embedding.shape[0])
        x = F.embedding(local * is_here, self._embedding)
        return self._collectives.reduce(x * is_here[:, None])
