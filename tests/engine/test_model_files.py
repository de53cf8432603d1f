"""Config, tokenizer and index of a model: what is wrong is named, nothing leaves the folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.model_config import load_spec
from tests.engine.driving import build


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type: 'mamba' is not supported"),
        ({"model_type": ...}, "model_type: is missing"),
        ({"hidden_size": ...}, "hidden_size: is missing"),
        ({"hidden_size": -64}, "hidden_size: -64 is not a positive"),
        ({"hidden_size": "64"}, "hidden_size: '64' is not a positive"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True is not a positive"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: must divide"),
        ({"head_dim": 15}, "head_dim: must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: 0 is not a positive"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: inf is not a positive"),
        ({"vocab_size": 1e9}, "vocab_size: .* is not a positive"),
        ({"hidden_act": "gelu"}, "hidden_act: only silu"),
        ({"attention_bias": True}, "attention_bias: is not supported"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' is not true or false"),
        ({"dtype": "int8"}, "dtype: 'int8' is not supported"),
        ({"dtype": ["float32"]}, "dtype: .'float32'. is not supported"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map: models with their own code"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type: 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor: is missing"),
        ({"rope_parameters": [1]}, "rope_parameters: must be an object"),
    ],
    ids=str,
)
def test_bad_config_values_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load_spec(folder)


def test_bad_eos_ids_are_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}')
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id"):
        load_spec(folder)
    (folder / "generation_config.json").unlink()
    assert load_spec(folder).eos_token_ids == (2,)  # from config.json


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_config_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_spec(folder)


def test_old_rope_fields_mean_the_same(folder: Path) -> None:
    new = load_spec(folder)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    _edit_config(folder, rope_parameters=..., rope_scaling=rope, rope_theta=theta)
    assert load_spec(folder) == new
    assert new.rope_scaling is not None


@pytest.mark.parametrize("place", ["vocabulary", "added tokens"])
def test_a_tokenizer_with_ids_beyond_the_vocabulary(folder: Path, place: str) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    if place == "vocabulary":
        tokenizer["model"]["vocab"]["beyond"] = 320
    else:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokenizer["added_tokens"].append({"id": 320, "content": "beyond"} | flags)
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"tokenizer\.json: token id 320 is beyond .* of 320"):
        build(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: no such file"):
        build(folder)
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        build(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "leads out of the model folder"),
        ({"a": "model.bin"}, "'model.bin' is not a safetensors file"),
        ({"a": 7}, "7 is not a safetensors file"),
        ({"a": "model-9.safetensors"}, "no such file"),
        ({}, "must be an object that is not empty"),
    ],
    ids=str,
)
def test_bad_index(folder: Path, weight_map: dict[str, Any], message: str) -> None:
    (folder.parent / "outside.safetensors").write_bytes(b"")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=message):
        build(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ModelError, match="leads out of the model folder"):
        build(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_folder_in_a_files_place(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ModelError, match=rf"{name}: not a file"):
        build(folder)


def test_a_folder_named_snapshots_opens_no_door(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "snapshots").mkdir(parents=True)
    folder = folder.rename(home / "snapshots" / "model")
    (folder / "generation_config.json").rename(home / "secret.json")
    (folder / "generation_config.json").symlink_to(home / "secret.json")
    with pytest.raises(ModelError, match="leads out of the model folder"):
        build(folder)


def test_a_tokenizer_that_is_none(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        build(folder)


def test_chat_template_may_be_a_field_of_the_tokenizer_config(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for value in ("TEMPLATE", [{"name": "default", "template": "TEMPLATE"}]):
        path.write_text(json.dumps(config | {"chat_template": value}))
        assert build(folder).assets("tiny").chat_template == "TEMPLATE"
