"""The choice of an attention backend."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from executor_svc.torch_engine.attention.choice import choose_backend
from executor_svc.torch_engine.config import EngineConfig
from tests.engine.driving import build, lease, run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = {torch.bfloat16}


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(models=(("m", "m"),), **settings)


@pytest.fixture
def has_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is installed."""
    find_spec = importlib.util.find_spec

    def find(name: str) -> object:
        return object() if name == "flash_attn" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_without_a_gpu_it_is_the_cpu_backend() -> None:
    assert choose_backend(config(), CPU, HALF) == "cpu"
    assert choose_backend(config(exact_mode=False, block_size=256), CPU, HALF) == "cpu"


@pytest.mark.usefixtures("has_flash_attn")
def test_the_choice_on_a_gpu() -> None:
    fast: dict[str, Any] = {"exact_mode": False}
    assert choose_backend(config(), CUDA, HALF) == "triton"
    assert choose_backend(config(block_size=256), CUDA, HALF) == "triton"
    assert choose_backend(config(block_size=512, **fast), CUDA, HALF) == "flash"
    assert choose_backend(config(block_size=128, **fast), CUDA, HALF) == "triton"
    both = {torch.bfloat16, torch.float32}
    assert choose_backend(config(block_size=256, **fast), CUDA, both) == "triton"


def test_without_the_package_a_gpu_uses_triton() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed")
    assert choose_backend(config(block_size=256, exact_mode=False), CUDA, HALF) == "triton"


def test_without_triton_a_gpu_uses_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend(config(block_size=256), CUDA, HALF) == "cpu"


@pytest.mark.parametrize("name", ["flash", "torch", "triton", "cpu", "reference"])
@pytest.mark.usefixtures("has_flash_attn")
def test_a_backend_that_can_work_can_be_forced(name: Any) -> None:
    forced = config(attention_backend=name, block_size=256, exact_mode=False)
    assert choose_backend(forced, CUDA, HALF) == name


@pytest.mark.parametrize(
    ("name", "settings", "device", "problem"),
    [
        ("triton", {}, CPU, "needs a CUDA device; device is cpu"),
        ("flash", {}, CPU, "needs a CUDA device; device is cpu"),
        ("torch", {"exact_mode": True}, CUDA, "needs exact_mode to be false"),
        ("flash", {"exact_mode": True}, CUDA, "needs exact_mode to be false"),
        ("flash", {"block_size": 16}, CUDA, "needs block_size to be a multiple of 256; it is 16"),
        ("torch", {"block_size": 384}, CUDA, "needs block_size to be a multiple of 256; it is 384"),
        ("torch", {"dtype": torch.float32}, CUDA, "needs dtype float16 or bfloat16; .* float32"),
    ],
)
def test_a_backend_that_cannot_work_is_refused(
    name: str, settings: dict[str, Any], device: torch.device, problem: str
) -> None:
    settings = {"exact_mode": False, "block_size": 256} | settings
    dtype = settings.pop("dtype", torch.bfloat16)
    with pytest.raises(ValueError, match=f"^attention_backend: {name} .*{problem}"):
        choose_backend(config(attention_backend=name, **settings), device, {dtype})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "flash_attn" else find_spec(name),
    )
    forced = config(attention_backend="flash", block_size=256, exact_mode=False)
    with pytest.raises(ValueError, match="flash needs the flash-attn package"):
        choose_backend(forced, CUDA, HALF)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^attention_backend must be one of auto, flash"):
        config(attention_backend="fast")


def test_torch_takes_the_arguments_that_we_pass() -> None:
    names = set(inspect.signature(varlen_attn).parameters)
    assert names >= {"window_size", "enable_gqa", "seqused_k", "block_table"}


def test_an_engine_runs_on_the_definition(qwen3: Path) -> None:
    leases = [lease(key, list(range(3, 20 + 30 * key))) for key in range(3)]
    usual = run(build(qwen3), *leases)
    defined = run(build(qwen3, attention_backend="reference", exact_mode=False), *leases)
    assert defined.tokens == usual.tokens
    assert all(
        defined.logprobs[key] == pytest.approx(usual.logprobs[key], abs=1e-5) for key in range(3)
    )


def test_the_engine_needs_neither_triton_nor_flash_attn() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["flash_attn"] = sys.modules["llguidance"] = None
import executor_svc.torch_engine.engine
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
