"""Weights that cannot be served say why; settings that make no sense do too."""

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
from tests.engine.checkpoints import edit_weights, make_checkpoint
from tests.engine.driving import build, lease, run

K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def test_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop(K_PROJ))
    with pytest.raises(ModelError, match=f"1 tensors missing, first {K_PROJ}"):
        build(folder)


def test_misshapen_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({K_PROJ: torch.zeros(64, 32)}))
    with pytest.raises(ModelError, match=rf"{K_PROJ} has shape \(64, 32\), expected \(32, 64\)"):
        build(folder)


def test_tensor_of_a_wrong_dtype(folder: Path) -> None:
    whole = torch.zeros(32, 64, dtype=torch.int32)
    edit_weights(folder, lambda weights: weights.update({K_PROJ: whole}))
    with pytest.raises(ModelError, match=f"{K_PROJ} has dtype I32"):
        build(folder)


def test_unexpected_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"extra.weight": torch.zeros(1)}))
    with pytest.raises(ModelError, match=r"unexpected tensor extra\.weight"):
        build(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_rotary_frequencies_of_old_checkpoints_are_passed_over(folder: Path, name: str) -> None:
    plain = run(build(folder), lease(0, [5]))
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(8)}))
    assert run(build(folder), lease(0, [5])).tokens == plain.tokens


def test_a_tensor_in_two_shards(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({K_PROJ: weights[K_PROJ]}, folder / "second.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"{K_PROJ} is also in model.safetensors"):
        build(folder)


def test_a_checkpoint_in_another_dtype_is_converted(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({name: tensor.half() for name, tensor in w.items()}))
    engine = build(folder)
    assert engine.models[0].dtype == "float32"
    assert len(run(engine, lease(0, [5])).tokens[0]) >= 1


def _huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 60) + data[8:]


def _lie(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A file whose header says something else; the data stay as they are."""

    def spoil(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return spoil


def _overlap(header: dict[str, Any]) -> None:
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-100],
        lambda data: data[:50],
        lambda data: b"",
        lambda data: data[:8] + b"x" + data[9:],
        _huge_header,
        _lie(_overlap),
    ],
    ids=["truncated", "header only", "empty", "broken json", "huge header", "overlap"],
)
def test_corrupt_file(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors: not a sound safetensors file"):
        build(folder)


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
    spoil = _lie(lambda header: change(header[K_PROJ]))
    path.write_bytes(spoil(path.read_bytes()))
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
    edit_weights(folder, lambda weights: weights[K_PROJ].zero_())
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: has changed since"):
        engine.load("tiny", ("other",))
    assert engine.load("other", ()) >= 0


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tied=True)
    plain = run(build(folder), lease(0, [5]))
    edit_weights(
        folder,
        lambda weights: weights.update(
            {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        ),
    )
    assert run(build(folder), lease(0, [5])).tokens == plain.tokens


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
