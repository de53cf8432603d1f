"""What is read from the config files of real models, and what is wrong with altered ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from executor_svc.torch_engine.config import ExpertsSpec, Llama3Scaling, ModelSpec
from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.model_config import load_spec
from executor_svc.torch_engine.models.tensors import tensor_shapes
from tests.engine.published_configs import (
    LLAMA_3_1_8B_INSTRUCT,
    LLAMA_3_2_1B,
    LLAMA_GENERATION,
    MISTRAL_7B_V0_1,
    MISTRAL_7B_V0_3,
    QWEN2_5_7B_INSTRUCT,
    QWEN3_0_6B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    QWEN3_GENERATION,
)


def _spec(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_spec(folder)


def _as_transformers_5_writes_it(config: dict[str, Any]) -> dict[str, Any]:
    """One object for the rope, ``dtype`` without its prefix, a list of layer types."""
    moved = ("rope_theta", "rope_scaling", "torch_dtype")
    rope = config.get("rope_scaling") or {"rope_type": "default"}
    has_windows = config["model_type"] == "mistral" and config["sliding_window"] is not None
    kind = "sliding_attention" if has_windows else "full_attention"
    return {key: value for key, value in config.items() if key not in moved} | {
        "rope_parameters": rope | {"rope_theta": config["rope_theta"]},
        "dtype": config["torch_dtype"],
        "layer_types": [kind] * config["num_hidden_layers"],
    }


@pytest.mark.parametrize(
    ("config", "generation", "expected", "num_parameters"),
    [
        (
            QWEN3_0_6B,
            QWEN3_GENERATION,
            {
                "head_dim": 128,
                "rope_theta": 1e6,
                "rope_scaling": None,
                "max_context_tokens": 40960,
                "has_qk_norm": True,
                "has_tied_head": True,
                "eos_token_ids": (151643, 151645),
                "kv_bytes_per_token": 114_688,
            },
            596_049_920,
        ),
        (
            QWEN3_8B,
            QWEN3_GENERATION,
            {"has_tied_head": False, "num_heads": 32, "kv_bytes_per_token": 147_456},
            8_190_735_360,
        ),
        (
            LLAMA_3_2_1B,
            None,
            {
                "head_dim": 64,
                "rope_theta": 5e5,
                "rope_scaling": Llama3Scaling(32.0, 1.0, 4.0, 8192),
                "max_context_tokens": 131_072,
                "has_qk_norm": False,
                "has_tied_head": True,
                "eos_token_ids": (128001,),
            },
            1_235_814_400,
        ),
        (
            LLAMA_3_1_8B_INSTRUCT,
            LLAMA_GENERATION,
            {
                "head_dim": 128,  # not in the file
                "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192),
                "has_tied_head": False,
                "eos_token_ids": (128001, 128008, 128009),
                "kv_bytes_per_token": 131_072,
            },
            8_030_261_248,
        ),
        (
            QWEN2_5_7B_INSTRUCT,
            None,
            {
                "head_dim": 128,  # not in the file
                "has_qk_norm": False,
                "has_qkv_bias": True,
                "max_context_tokens": 32_768,
                "windows": (None,) * 28,  # use_sliding_window is false
                "experts": None,
                "kv_bytes_per_token": 57_344,
            },
            7_615_616_512,
        ),
        (
            MISTRAL_7B_V0_3,
            None,
            {
                "head_dim": 128,  # not in the file
                "has_qkv_bias": False,
                "max_context_tokens": 32_768,
                "eos_token_ids": (2,),
                "kv_bytes_per_token": 131_072,
            },
            7_248_023_552,
        ),
        (
            MISTRAL_7B_V0_1,
            None,
            {"max_context_tokens": 32_768, "rope_theta": 1e4, "windows": (4096,) * 32},
            7_241_732_096,
        ),
        (
            QWEN3_30B_A3B,
            QWEN3_GENERATION,
            {
                "has_qk_norm": True,
                "experts": ExpertsSpec(128, 8, 768, True, frozenset(range(48))),
                "kv_bytes_per_token": 98_304,
            },
            30_532_122_624,
        ),
    ],
    ids=[
        "Qwen3-0.6B",
        "Qwen3-8B",
        "Llama-3.2-1B",
        "Llama-3.1-8B-Instruct",
        "Qwen2.5-7B-Instruct",
        "Mistral-7B-v0.3",
        "Mistral-7B-v0.1",
        "Qwen3-30B-A3B",
    ],
)
def test_published_configs_are_read_in_full(
    tmp_path: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    expected: dict[str, Any],
    num_parameters: int,
) -> None:
    spec = _spec(tmp_path, config, generation)
    assert spec.dtype is torch.bfloat16
    assert {name: getattr(spec, name) for name in expected} == expected
    # The parameter counts on the models' own cards.
    assert sum(torch.Size(shape).numel() for shape in tensor_shapes(spec).values()) == (
        num_parameters
    )
    assert _spec(tmp_path, _as_transformers_5_writes_it(config), generation) == spec


def test_a_rope_for_each_type_of_layer_is_refused(tmp_path: Path) -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    config = QWEN3_0_6B | {"rope_parameters": rope}
    with pytest.raises(ModelError, match="rope_parameters: a rope for each type of layer"):
        _spec(tmp_path, config, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts: is missing"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok: must not be above num_experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: 0 is not a positive"),
        ({"norm_topk_prob": 1}, "norm_topk_prob: 1 is not true or false"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: 0 is not a positive"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: 3 is not a list"),
        ({"mlp_only_layers": ["3"]}, r"mlp_only_layers: \['3'\] is not a list"),
        ({"head_dim": None}, "head_dim: is missing"),
        ({"num_key_value_heads": None}, "num_key_value_heads: is missing"),
    ],
    ids=str,
)
def test_bad_fields_of_experts_and_heads_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        _spec(tmp_path, QWEN3_30B_A3B | changes, None)


def test_layers_without_experts_are_found_as_transformers_does(tmp_path: Path) -> None:
    changes = {"decoder_sparse_step": 2, "mlp_only_layers": [1, 5], "num_hidden_layers": 8}
    spec = _spec(tmp_path, QWEN3_30B_A3B | changes, None)
    assert spec.experts is not None
    assert spec.experts.layers == {3, 7}
    shapes = tensor_shapes(spec)
    assert "model.layers.2.mlp.down_proj.weight" in shapes
    assert "model.layers.3.mlp.experts.127.down_proj.weight" in shapes
    assert shapes["model.layers.3.mlp.gate.weight"] == (128, 2048)
