"""Which layers have a sliding window: read as transformers reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.model_config import load_spec
from executor_svc.torch_engine.windows import Windows
from tests.engine.checkpoints import make_checkpoint

NUM_LAYERS, CONTEXT = 4, 1024
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = [SLIDING, FULL, FULL, SLIDING]
ON: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 100}
QWEN3_MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}


def _config(family: str, **fields: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
    }
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    shape |= {"num_hidden_layers": NUM_LAYERS, "max_position_embeddings": CONTEXT}
    shape |= QWEN3_MOE if family == "qwen3_moe" else {}
    return {"model_type": family} | shape | fields


def _windows(folder: Path, config: dict[str, Any], max_model_len: int | None = None) -> Windows:
    (folder / "config.json").write_text(json.dumps(config))
    return load_spec(folder, max_model_len=max_model_len).windows


def _windows_of_transformers(folder: Path) -> Windows:
    """Qwen2 and Qwen3 look a layer up in layer_types; the others treat all layers alike."""
    config = AutoConfig.from_pretrained(folder)
    window = getattr(config, "sliding_window", None) if config.model_type != "llama" else None
    if config.model_type in ("qwen2", "qwen3"):
        return tuple(window if kind == SLIDING else None for kind in config.layer_types)
    return (window,) * config.num_hidden_layers


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, None),
        ("llama", ON, None),  # no fields of Llama's
        ("mistral", {"sliding_window": 100}, [100] * 4),
        ("mistral", {"sliding_window": 100, "use_sliding_window": False}, [100] * 4),
        ("mistral", {"sliding_window": 100, "layer_types": [SLIDING] * 4}, [100] * 4),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"max_position_embeddings": 8192}, [4096] * 4),  # where it is missing
        ("qwen2", {"sliding_window": 100}, None),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, None),
        ("qwen2", ON | {"max_window_layers": 3}, [None, None, None, 100]),
        ("qwen2", ON | {"max_window_layers": 0}, [100] * 4),
        ("qwen2", ON | {"max_window_layers": 4}, None),
        ("qwen2", ON, None),  # 28 layers have none
        ("qwen2", ON | {"sliding_window": None, "max_window_layers": 0}, None),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1, "max_position_embeddings": 8192},
            [None, 4096, 4096, 4096],
        ),
        ("qwen2", ON | {"layer_types": MIXED, "max_window_layers": 4}, [100, None, None, 100]),
        ("qwen3", ON | {"layer_types": MIXED}, [100, None, None, 100]),
        ("qwen3", ON | {"layer_types": None, "max_window_layers": 2}, [None, None, 100, 100]),
        ("qwen3", ON | {"layer_types": [FULL] * 4}, None),
        ("qwen3_moe", {"sliding_window": 100}, None),
        ("qwen3_moe", ON | {"max_window_layers": 3}, [100] * 4),  # not looked at
    ],
    ids=str,
)
def test_windows_are_those_of_transformers(
    tmp_path: Path, family: str, fields: dict[str, Any], expected: list[int | None] | None
) -> None:
    wanted = tuple(expected or [None] * NUM_LAYERS)
    assert _windows(tmp_path, _config(family, **fields)) == wanted
    assert _windows_of_transformers(tmp_path) == wanted


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2", **ON, max_window_layers=1)
    assert "layer_types" in json.loads((folder / "config.json").read_text())
    assert load_spec(folder).windows == (None, 100)


def test_a_window_that_no_context_outgrows_is_none(tmp_path: Path) -> None:
    assert _windows(tmp_path, _config("mistral", sliding_window=CONTEXT)) == (None,) * 4
    windowed = _config("mistral", sliding_window=CONTEXT - 1)
    assert _windows(tmp_path, windowed) == (CONTEXT - 1,) * 4
    assert _windows(tmp_path, windowed, max_model_len=CONTEXT - 1) == (None,) * 4
    assert _windows(tmp_path, windowed, max_model_len=5 * CONTEXT) == (CONTEXT - 1,) * 4


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mistral", {"sliding_window": -1}, "sliding_window: -1 is not a positive"),
        ("mistral", {"sliding_window": 0}, "sliding_window: 0 is not a positive"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window: '4096' is not a positive"),
        ("mistral", {"sliding_window": True}, "sliding_window: True is not a positive"),
        ("mistral", {"sliding_window": 9, "layer_types": MIXED}, f"layer_types: .*'{SLIDING}'"),
        ("mistral", {"sliding_window": None, "layer_types": MIXED}, f"layer_types: .*'{FULL}'"),
        ("llama", {"layer_types": MIXED}, f"layer_types: .*'{FULL}'"),
        ("qwen3_moe", ON | {"layer_types": [FULL] * 4}, f"layer_types: .*'{SLIDING}'"),
        ("qwen3_moe", {"layer_types": [SLIDING] * 4}, f"layer_types: .*'{FULL}'"),
        ("qwen2", ON | {"sliding_window": -4096}, "sliding_window: -4096 is not a positive"),
        ("qwen2", ON | {"max_window_layers": -1}, "max_window_layers: -1 is not a whole number"),
        ("qwen2", ON | {"max_window_layers": 1.5}, "max_window_layers: 1.5 is not a whole number"),
        ("qwen3", {"use_sliding_window": 1}, "use_sliding_window: 1 is not true or false"),
        (
            "qwen3",
            {"sliding_window": 100, "layer_types": MIXED},
            "use_sliding_window: None contradicts 'sliding_attention' in layer_types",
        ),
        (
            "qwen3",
            {"use_sliding_window": False, "layer_types": MIXED},
            "use_sliding_window: False contradicts",
        ),
        (
            "qwen3",
            ON | {"sliding_window": None, "layer_types": MIXED},
            "sliding_window: None contradicts",
        ),
        ("qwen3", ON | {"layer_types": MIXED[:3]}, "layer_types: has 3 entries for 4 layers"),
        ("qwen3", ON | {"layer_types": []}, "layer_types: has 0 entries for 4 layers"),
        ("qwen3", ON | {"layer_types": ["chunked_attention"] * 4}, "layer_types: 'chunked_att"),
        ("qwen3", ON | {"layer_types": [[]] * 4}, r"layer_types: \[\] is not full_attention or"),
        ("qwen3", ON | {"layer_types": {"0": FULL}}, "layer_types: .* is not a list"),
    ],
    ids=str,
)
def test_contradictions_are_named(
    tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        _windows(tmp_path, _config(family, **fields))
