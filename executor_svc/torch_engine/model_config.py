"""Reads a model's ``config.json``.

It is read field by field into ``ModelSpec``. Nothing in it is ever run: a config that wants its
own code (``auto_map``), or that asks for something the decoder does not do, is refused with a
``ModelError`` that names the field. Defaults are those of transformers, where a published config
leaves a field out; a field that decides a model's numbers and has no such default must be there.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from executor_svc.torch_engine.config import DTYPES, ExpertsSpec, Llama3Scaling, ModelSpec
from executor_svc.torch_engine.fields import Fields
from executor_svc.torch_engine.files import find_model_file, model_file
from executor_svc.torch_engine.windows import WindowRule, layer_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """How the models of one ``model_type`` differ from the rest."""

    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_experts: bool = False
    may_omit_head_dim: bool = False
    may_omit_kv_heads: bool = False
    windows: WindowRule


_FAMILIES = {
    "llama": _Family(may_omit_head_dim=True, may_omit_kv_heads=True, windows=WindowRule.NONE),
    "mistral": _Family(may_omit_head_dim=True, windows=WindowRule.ALL),
    # and 2.5
    "qwen2": _Family(may_omit_head_dim=True, has_qkv_bias=True, windows=WindowRule.BY_LAYER),
    "qwen3": _Family(has_qk_norm=True, windows=WindowRule.BY_LAYER),
    "qwen3_moe": _Family(has_qk_norm=True, has_experts=True, windows=WindowRule.ALL_IF_USED),
}


def load_spec(folder: Path, *, dtype: str = "auto", max_model_len: int | None = None) -> ModelSpec:
    """Read ``config.json`` (and the EOS ids of ``generation_config.json``) of a model folder.

    ``max_model_len`` is the context that will be served, if not the model's own.
    """
    config = Fields(model_file(folder, "config.json"))
    name = config.text("model_type")
    family = _FAMILIES.get(name)
    if family is None:
        raise config.error("model_type", f"{name!r} is not supported ({', '.join(_FAMILIES)} are)")
    _refuse_what_the_decoder_lacks(config)
    max_context_tokens = config.positive("max_position_embeddings")
    hidden_size = config.positive("hidden_size")
    num_heads = config.positive("num_attention_heads")
    num_kv_heads = config.positive(
        "num_key_value_heads", default=num_heads if family.may_omit_kv_heads else None
    )
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", "must divide num_attention_heads")
    head_dim = config.positive(
        "head_dim", default=hidden_size // num_heads if family.may_omit_head_dim else None
    )
    if head_dim % 2:
        raise config.error("head_dim", "must be even")
    num_layers = config.positive("num_hidden_layers")
    vocab_size = config.positive("vocab_size")
    theta, scaling = _rope(config)
    return ModelSpec(
        family=name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=config.positive("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.positive_float("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        max_context_tokens=max_context_tokens,
        windows=layer_windows(
            config,
            family.windows,
            num_layers=num_layers,
            num_tokens=min(max_context_tokens, max_model_len or max_context_tokens),
        ),
        has_qk_norm=family.has_qk_norm,
        has_qkv_bias=family.has_qkv_bias,
        experts=_experts(config, num_layers) if family.has_experts else None,
        has_tied_head=config.flag("tie_word_embeddings"),
        dtype=_dtype(config, dtype),
        eos_token_ids=_eos_token_ids(folder, config, vocab_size),
    )


def _refuse_what_the_decoder_lacks(config: Fields) -> None:
    if config.get("auto_map") is not None:
        raise config.error("auto_map", "models with their own code are not served")
    if config.get("quantization_config") is not None:
        raise config.error("quantization_config", "quantised checkpoints are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", "only silu is supported")
    for name in ("attention_bias", "mlp_bias"):
        if config.flag(name):
            raise config.error(name, "is not supported")


def _experts(config: Fields, num_layers: int) -> ExpertsSpec:
    # num_local_experts is what transformers 5 writes
    num_experts = config.positive("num_experts", default=config.get("num_local_experts"))
    num_chosen = config.positive("num_experts_per_tok")
    if num_chosen > num_experts:
        raise config.error("num_experts_per_tok", "must not be above num_experts")
    every = config.positive("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise config.error("mlp_only_layers", f"{dense!r} is not a list of numbers of layers")
    return ExpertsSpec(
        num_experts=num_experts,
        num_experts_per_token=num_chosen,
        intermediate_size=config.positive("moe_intermediate_size"),
        are_weights_normalized=config.flag("norm_topk_prob"),
        layers=frozenset(
            layer for layer in range(num_layers) if (layer + 1) % every == 0 and layer not in dense
        ),
    )


def _rope(config: Fields) -> tuple[float, Llama3Scaling | None]:
    """Rotary base and scaling, from transformers' new field or from its two old ones."""
    name = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = config.section(name)
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise config.error(name, "a rope for each type of layer is not supported")
    source = rope if rope.get("rope_theta") is not None else config
    theta = source.positive_float("rope_theta", default=10_000.0)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "only 1.0 is supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.error("rope_type", f"{kind!r} is not supported (default and llama3 are)")
    scaling = Llama3Scaling(
        factor=rope.positive_float("factor"),
        low_freq_factor=rope.positive_float("low_freq_factor"),
        high_freq_factor=rope.positive_float("high_freq_factor"),
        original_max_position_embeddings=rope.positive("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.error("high_freq_factor", "must be above low_freq_factor")
    return theta, scaling


def _dtype(config: Fields, wanted: str) -> torch.dtype:
    name = wanted
    if wanted == "auto":
        name = config.get("dtype", config.get("torch_dtype", "float32"))
    if not isinstance(name, str) or name not in DTYPES:
        raise config.error("dtype", f"{name!r} is not supported ({', '.join(DTYPES)} are)")
    return DTYPES[name]


def _eos_token_ids(folder: Path, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """EOS ids: generation_config.json has the last word, config.json may stand in for it."""
    path = find_model_file(folder, "generation_config.json")
    source = config if path is None else Fields(path)
    if source.get("eos_token_id") is None:
        source = config
    value = source.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise source.error("eos_token_id", f"{value!r} is not made of token ids")
    return tuple(sorted(set(ids)))
