"""The tiny checkpoints, made once a session, and engines on them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.token_bytes import TokenBytes
from tests.engine.checkpoints import make_checkpoint
from tests.engine.driving import build

# Far shorter than the sequences, and no multiple of a block. In Qwen2 the first layer has none.
_WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3"},
    "qwen3-tied-sharded": {"family": "qwen3", "tied": True, "sharded": True},
    "llama": {"family": "llama", "sharded": True},
    "llama-tied": {"family": "llama", "tied": True},
    # As many heads to a kv head as Qwen2.5 has: no number that tiles are made for.
    "qwen2": {"family": "qwen2", "num_attention_heads": 14, "sharded": True},
    "mistral": {"family": "mistral"},
    "mistral-window": {"family": "mistral", "sliding_window": 20},
    "qwen2-window": {"family": "qwen2", "num_attention_heads": 14, **_WINDOW},
    "qwen3-window": {
        "family": "qwen3",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        **_WINDOW,
    },
    "qwen3-moe": {"family": "qwen3_moe", "norm_topk_prob": True, "sharded": True},
    "qwen3-moe-window": {"family": "qwen3_moe", "norm_topk_prob": True, **_WINDOW},
    "qwen3-moe-mixed": {"family": "qwen3_moe", "mlp_only_layers": [0], "tied": True},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_checkpoint(tmp_path_factory.mktemp("model") / name, **options)
        for name, options in CHECKPOINTS.items()
    }


@pytest.fixture(scope="session")
def qwen3(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["qwen3"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the test's own, which it may spoil."""
    return make_checkpoint(tmp_path / "model", "llama")


@pytest.fixture
def engine(qwen3: Path) -> TorchEngine:
    return build(qwen3)


@pytest.fixture(scope="module")
def shared_engine(qwen3: Path) -> TorchEngine:
    """For tests that leave nothing in it but its cache."""
    return build(qwen3)


@pytest.fixture(scope="session")
def tokenizer_json(qwen3: Path) -> bytes:
    return (qwen3 / "tokenizer.json").read_bytes()


@pytest.fixture(scope="session")
def pieces(tokenizer_json: bytes) -> TokenBytes:
    """The bytes of each token."""
    return TokenBytes(tokenizer_json)
