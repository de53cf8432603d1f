"""Models that cannot be served say why, and nothing leaves the model's folder."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from executor_svc.core.engine import ModelLoadError
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.model_config import load_spec
from tests.engine.checkpoints import make_checkpoint
from tests.engine.driving import build, lease, run

K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama")


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path)


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


def test_missing_tensor(folder: Path) -> None:
    _edit_weights(folder, lambda weights: weights.pop(K_PROJ))
    with pytest.raises(ModelError, match=f"1 tensors missing, first {K_PROJ}"):
        build(folder)


def test_misshapen_tensor(folder: Path) -> None:
    _edit_weights(folder, lambda weights: weights.update({K_PROJ: torch.zeros(64, 32)}))
    with pytest.raises(ModelError, match=rf"{K_PROJ} has shape \(64, 32\), expected \(32, 64\)"):
        build(folder)


def test_tensor_of_a_wrong_dtype(folder: Path) -> None:
    whole = torch.zeros(32, 64, dtype=torch.int32)
    _edit_weights(folder, lambda weights: weights.update({K_PROJ: whole}))
    with pytest.raises(ModelError, match=f"{K_PROJ} has dtype I32"):
        build(folder)


def test_unexpected_tensor(folder: Path) -> None:
    _edit_weights(folder, lambda weights: weights.update({"extra.weight": torch.zeros(1)}))
    with pytest.raises(ModelError, match=r"unexpected tensor extra\.weight"):
        build(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_rotary_frequencies_of_old_checkpoints_are_passed_over(folder: Path, name: str) -> None:
    plain = run(build(folder), lease(0, [5]))
    _edit_weights(folder, lambda weights: weights.update({name: torch.ones(8)}))
    assert run(build(folder), lease(0, [5])).tokens == plain.tokens


def test_a_tensor_in_two_shards(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({K_PROJ: weights[K_PROJ]}, folder / "second.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"{K_PROJ} is also in model.safetensors"):
        build(folder)


def test_a_checkpoint_in_another_dtype_is_converted(folder: Path) -> None:
    _edit_weights(folder, lambda w: w.update({name: tensor.half() for name, tensor in w.items()}))
    engine = build(folder)
    assert engine.models[0].dtype == "float32"
    assert len(run(engine, lease(0, [5])).tokens[0]) >= 1


def _huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 60) + data[8:]


def _overlapping_offsets(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-100],
        lambda data: data[:50],
        lambda data: b"",
        lambda data: data[:8] + b"x" + data[9:],
        _huge_header,
        _overlapping_offsets,
    ],
    ids=["truncated", "header only", "empty", "broken json", "huge header", "overlap"],
)
def test_corrupt_file(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors: not a sound safetensors file"):
        build(folder)


def _lie(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A file whose header says something else about K_PROJ; the data stay as they are."""

    def spoil(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header[K_PROJ])
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return spoil


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(shape=[32, 1 << 40]), "not a sound safetensors file"),
        (lambda entry: entry.update(shape=[1 << 63, 2]), "not a sound safetensors file"),
        (lambda entry: entry.update(shape=[-1, 64]), "not a sound safetensors file"),
        (lambda entry: entry.update(dtype="BF16"), "not a sound safetensors file"),
        (lambda entry: entry.update(dtype="Q4"), "not a sound safetensors file"),
        (lambda entry: entry.update(data_offsets=[0, 1 << 60]), "not a sound safetensors file"),
        (lambda entry: entry.update(dtype="I32"), "has dtype I32"),
        (lambda entry: entry.update(shape=[64, 32]), "has shape"),
    ],
    ids=["huge", "overflow", "negative", "narrow", "unknown dtype", "beyond", "whole", "turned"],
)
def test_a_header_that_lies(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(_lie(change)(path.read_bytes()))
    with pytest.raises(ModelError, match=rf"model\.safetensors: .*{message}"):
        build(folder)


def test_a_file_that_is_overwritten_does_not_change_a_model_that_was_loaded(folder: Path) -> None:
    engine = build(folder)
    before = run(engine, lease(0, [5]))
    with (folder / "model.safetensors").open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        size = file.seek(0, 2) - 8 - length
        file.seek(8 + length)
        file.write(bytes(size))
    after = run(engine, lease(1, [5]))
    assert (after.tokens[1], after.logprobs[1]) == (before.tokens[0], before.logprobs[0])


def test_a_file_that_changes_before_its_model_is_loaded_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", "llama")
    engine = TorchEngine(
        EngineConfig(
            models=(("other", str(other)), ("tiny", str(folder))),
            max_models=1,
            kv_bytes=1 << 22,
            num_threads=1,
        )
    )
    _edit_weights(folder, lambda weights: weights[K_PROJ].zero_())
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: has changed since"):
        engine.load("tiny", ("other",))
    assert engine.load("other", ()) >= 0


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


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tied=True)
    plain = run(build(folder), lease(0, [5]))
    _edit_weights(
        folder,
        lambda weights: weights.update(
            {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        ),
    )
    assert run(build(folder), lease(0, [5])).tokens == plain.tokens


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


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": 100, "max_num_batched_tokens": 50},
        {"block_size": 0},
        {"num_blocks": 0},
        {"kv_bytes": -1},
        {"gpu_memory_utilization": 1.5},
        {"dtype": "int4"},
        {"max_model_len": 0},
        {"num_threads": 0},
        {"max_models": -1},
    ],
    ids=str,
)
def test_senseless_settings_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings)).replace("max_num_seqs", "max_num")):
        EngineConfig(models=(("m", "m"),), **settings)


def test_a_cache_too_small_for_one_block_is_refused(folder: Path) -> None:
    config = EngineConfig(models=(("m", str(folder)),), kv_bytes=100)
    with pytest.raises(ValueError, match="kv_bytes"):
        TorchEngine(config)
