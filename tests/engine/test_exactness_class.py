"""The class by which engines know each other: what it is made of, and when it is empty."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.torch_engine.attention.cpu import CpuAttention
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.models.decoder import Decoder
from tests.engine.checkpoints import edit_weights, make_checkpoint
from tests.engine.driving import build


def _class(folder: Path, **settings: Any) -> str:
    return build(folder, **settings).models[0].exactness_class


def test_equal_engines_are_of_one_class_whatever_their_batches_are(qwen3: Path) -> None:
    usual = _class(qwen3)
    assert len(bytes.fromhex(usual)) == 32
    for settings in (
        {"max_num_seqs": 2, "max_num_batched_tokens": 9},
        {"block_size": 5},
        {"enable_prefix_caching": False},
        {"num_blocks": 9},  # preempts in the self-test
        {"num_threads": 2},
    ):
        assert _class(qwen3, **settings) == usual, settings


def test_each_ingredient_makes_another_class(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = [
        _class(qwen3),
        _class(qwen3, dtype="bfloat16"),
        _class(qwen3, attention_backend="reference"),
        _class(qwen3, quantization="int8"),
        _class(make_checkpoint(tmp_path, seed=1)),
    ]
    monkeypatch.setattr(torch, "__version__", "2.13.1")
    classes.append(_class(qwen3))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    classes.append(_class(qwen3))
    promised = [name for name in classes if name]
    assert len(set(promised)) == len(promised) >= 5
    assert all(classes[i] for i in (0, 1, 4, 5, 6))


def test_tiles_of_another_size_are_another_class(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = _class(qwen3)
    init = CpuAttention.__init__

    def with_other_tiles(self: CpuAttention, *args: Any, **fields: Any) -> None:
        init(self, *args, **(fields | {"tile_rows": 64}))

    monkeypatch.setattr(CpuAttention, "__init__", with_other_tiles)
    other = _class(qwen3)
    assert other not in ("", usual)


def test_other_windows_are_another_class(tmp_path: Path) -> None:
    """Even those that the self-test is too short to notice."""
    classes = [
        _class(make_checkpoint(tmp_path / str(window), "mistral", sliding_window=window))
        for window in (600, 700, None)
    ]
    assert all(classes)
    assert len(set(classes)) == 3


def test_a_model_that_feels_its_company_promises_nothing(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = Decoder.logits

    def by_number_of_rows(self: Decoder, hidden: Tensor) -> Tensor:
        return logits(self, hidden) * (1 + 1e-6 * hidden.shape[0])

    monkeypatch.setattr(Decoder, "logits", by_number_of_rows)
    assert _class(qwen3) == ""


def _decode_alone_differs(patch: pytest.MonkeyPatch, *, past_key: int) -> None:
    """A decode step of one sequence that sees more keys than so many comes out a little larger."""
    run_attention = CpuAttention.run

    def run(self: CpuAttention, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = run_attention(self, layer_index, q, k, v)
        sees_more = any(tile.keys.stop > past_key for tile in self._plans[None].groups[0].tiles)
        return out * (1 + 1e-6) if len(self._slots) == 1 and sees_more else out

    patch.setattr(CpuAttention, "run", run)


def test_a_decode_that_differs_from_prefill_promises_nothing(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _decode_alone_differs(monkeypatch, past_key=0)
    assert _class(qwen3) == ""


def test_a_decode_that_differs_past_a_block_of_keys_promises_nothing(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _decode_alone_differs(monkeypatch, past_key=512)
    assert _class(qwen3) == ""
    assert _class(qwen3, max_model_len=400) != ""


def test_without_exact_mode_nothing_is_promised(qwen3: Path) -> None:
    assert _class(qwen3, exact_mode=False) == ""


def test_models_that_cannot_be_probed_promise_nothing(qwen3: Path, tmp_path: Path) -> None:
    assert _class(qwen3, num_blocks=1, block_size=1) == ""
    assert _class(qwen3, num_blocks=1, block_size=2) != ""
    folder = make_checkpoint(tmp_path)
    edit_weights(folder, lambda weights: weights["model.norm.weight"].fill_(math.nan))
    assert _class(folder) == ""


def test_a_cold_model_is_of_no_class_until_it_is_loaded(qwen3: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, seed=1)
    models = (("a", str(qwen3)), ("b", str(other)))
    engine = TorchEngine(EngineConfig(models=models, max_models=1, kv_bytes=1 << 22, num_threads=1))
    first, cold = (info.exactness_class for info in engine.models)
    assert (bool(first), cold) == (True, "")
    engine.load("b", ("a",))
    assert engine.models[0].exactness_class == first
    assert engine.models[1].exactness_class not in ("", first)
