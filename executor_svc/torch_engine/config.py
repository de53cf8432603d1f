"""What to load and how to run it: our own settings, and a model's ``config.json``.

A model's config is read field by field into ``ModelSpec``. Nothing in it is ever run: a config
that wants its own code (``auto_map``), or that asks for something the decoder does not do, is
refused with a ``ModelError`` that names the field.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor_svc.torch_engine.files import (
    ModelError,
    find_model_file,
    model_file,
    read_json_object,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of a TorchEngine, under vLLM's names. A senseless value raises ValueError.

    A model's KV cache has ``num_blocks`` blocks, else as many as its share of ``kv_bytes`` holds,
    which is the same for ``max_models`` models. Without ``kv_bytes``, a CPU has 1 GiB to share, and
    a GPU ``gpu_memory_utilization`` of its memory less what is in use and what weights may take.

    Without ``num_threads`` models below 100 million parameters get one thread, a larger one
    torch's own choice: all cores. Measured on two cores that others used too, with 8 sequences:
    a second thread makes 0.4 times the tokens/s at 6 million parameters, 1.1 at 90, 1.5 at 210.
    """

    models: tuple[tuple[str, str], ...]  # (name, folder or Hugging Face hub id)
    max_models: int = 0  # on the device at once, the first ones first; 0 is all
    device: str = "cpu"
    dtype: str = "auto"  # "auto" is the checkpoint's own
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None  # shortens the model's own context
    block_size: int = 16
    num_blocks: int | None = None
    kv_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if not self.models or len(dict(self.models)) < len(self.models):
            raise ValueError("models must be there and have different names")
        if self.max_models < 0:
            raise ValueError("max_models must not be negative")
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("max_model_len", "num_blocks", "kv_bytes", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must not be less than max_num_seqs")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError("gpu_memory_utilization must be above 0 and at most 1")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}")


def find_device(name: str) -> torch.device:
    """The device of this name; ValueError if the engine has none such."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {name!r} is not cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not there")
    return device


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of slow rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder."""

    family: str  # "qwen3" or "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    max_context_tokens: int
    has_qk_norm: bool
    has_tied_head: bool
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values per token in the checkpoint's dtype."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def load_spec(folder: Path, *, dtype: str = "auto") -> ModelSpec:
    """Read ``config.json`` (and the EOS ids of ``generation_config.json``) of a model folder."""
    config = _Fields(model_file(folder, "config.json"))
    family = config.text("model_type")
    if family not in ("qwen3", "llama"):
        raise config.error("model_type", f"{family!r} is not supported (qwen3 and llama are)")
    _refuse_what_the_decoder_lacks(config)

    hidden_size = config.positive("hidden_size")
    num_heads = config.positive("num_attention_heads")
    num_kv_heads = config.positive("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", "must divide num_attention_heads")
    # Only Llama's configs may leave head_dim out.
    head_dim = config.positive(
        "head_dim", default=hidden_size // num_heads if family == "llama" else None
    )
    if head_dim % 2:
        raise config.error("head_dim", "must be even")
    vocab_size = config.positive("vocab_size")
    theta, scaling = _rope(config)
    return ModelSpec(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=config.positive("intermediate_size"),
        num_layers=config.positive("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.positive_float("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        max_context_tokens=config.positive("max_position_embeddings"),
        has_qk_norm=family == "qwen3",
        has_tied_head=config.flag("tie_word_embeddings"),
        dtype=_dtype(config, dtype),
        eos_token_ids=_eos_token_ids(folder, config, vocab_size),
    )


def _refuse_what_the_decoder_lacks(config: "_Fields") -> None:
    if config.get("auto_map") is not None:
        raise config.error("auto_map", "models with their own code are not served")
    if config.get("quantization_config") is not None:
        raise config.error("quantization_config", "quantised checkpoints are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", "only silu is supported")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.flag(name):
            raise config.error(name, "is not supported")


def _rope(config: "_Fields") -> tuple[float, Llama3Scaling | None]:
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


def _dtype(config: "_Fields", wanted: str) -> torch.dtype:
    name = wanted
    if wanted == "auto":
        name = config.get("dtype", config.get("torch_dtype", "float32"))
    if not isinstance(name, str) or name not in DTYPES:
        raise config.error("dtype", f"{name!r} is not supported ({', '.join(DTYPES)} are)")
    return DTYPES[name]


def _eos_token_ids(folder: Path, config: "_Fields", vocab_size: int) -> tuple[int, ...]:
    """EOS ids: generation_config.json has the last word, config.json may stand in for it."""
    path = find_model_file(folder, "generation_config.json")
    source = config if path is None else _Fields(path)
    if source.get("eos_token_id") is None:
        source = config
    value = source.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise source.error("eos_token_id", f"{value!r} is not made of token ids")
    return tuple(sorted(set(ids)))


class _Fields:
    """A JSON object read with checks; ``null`` counts as missing."""

    def __init__(self, path: Path, prefix: str = "", values: dict[str, Any] | None = None) -> None:
        self._path, self._prefix = path, prefix
        self.values = read_json_object(path) if values is None else values

    def error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self._path}: {self._prefix}{name}: {problem}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def section(self, name: str) -> "_Fields":
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return _Fields(self._path, f"{self._prefix}{name}.", value)

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error(name, "is missing or not a text")
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, f"{value!r} is not true or false")
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing")
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(name, f"{value!r} is not a positive whole number")
        return value

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing")
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise self.error(name, f"{value!r} is not a positive number")
        return float(value)
