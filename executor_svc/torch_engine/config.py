"""What to load and how to run it: our own settings, and the shape of a model."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from executor_svc.torch_engine.grammar import GrammarLimits
from executor_svc.torch_engine.windows import Windows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("none", "int8")
AttentionName = Literal["auto", "flash", "torch", "triton", "cpu", "reference"]


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
    attention_backend: AttentionName = "auto"  # see attention/choice.py
    enforce_eager: bool = False  # no CUDA graphs
    # Plan a step while the one before runs, see resident.py; None: on a GPU.
    overlap_scheduling: bool | None = None
    enable_prefix_caching: bool = True
    exact_mode: bool = True  # see exactness.py
    quantization: str = "none"  # "int8": weights of 8 bits, see linear.py
    tensor_parallel_size: int = 1  # processes that share each model, on devices in a row
    tensor_parallel_timeout_ms: int = 60_000  # longest wait for another of them inside a step
    max_logits_rows: int | None = None  # of a prompt that are scored together, see scoring.py
    grammar_limits: GrammarLimits = field(default_factory=GrammarLimits)

    def __post_init__(self) -> None:
        if not self.models or len(dict(self.models)) < len(self.models):
            raise ValueError("models must be there and have different names")
        if self.max_models < 0:
            raise ValueError("max_models must not be negative")
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "tensor_parallel_size",
            "tensor_parallel_timeout_ms",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("max_model_len", "num_blocks", "kv_bytes", "num_threads", "max_logits_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must not be less than max_num_seqs")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError("gpu_memory_utilization must be above 0 and at most 1")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}")
        if self.attention_backend not in get_args(AttentionName):
            raise ValueError(
                f"attention_backend must be one of {', '.join(get_args(AttentionName))}"
            )
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}")
        if self.quantization != "none" and self.device != "cpu":
            raise ValueError("quantization is for the device cpu only")


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
class ExpertsSpec:
    """Feed-forwards of which each token uses the few that its router likes best."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    are_weights_normalized: bool  # those of the chosen ones sum to 1
    layers: frozenset[int]  # that have experts; the others have one feed-forward


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder."""

    family: str  # the config's model_type
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
    windows: Windows
    has_qk_norm: bool
    has_qkv_bias: bool
    experts: ExpertsSpec | None
    has_tied_head: bool
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values per token in the checkpoint's dtype."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
