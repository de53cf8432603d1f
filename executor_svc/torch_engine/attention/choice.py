"""Which attention backend an engine uses, and how it is built.

Rule: in exact mode a GPU uses our own Triton kernels, since there a token's row has the same bits
in a prefill and in a decode step. Without it, a GPU whose blocks suit FlashAttention uses the
``flash-attn`` package where it is installed, else Triton for decode and torch's own FlashAttention
for prefill. Without a GPU it is the CPU backend. A setting forces any of them; what cannot work is
refused by name.

Backends are imported where they are built: triton and flash-attn need not be installed.
"""

import importlib.util
import inspect
from collections.abc import Collection

import torch

from executor_svc.torch_engine.attention.base import AttentionBackend, StepLimits
from executor_svc.torch_engine.config import AttentionName, EngineConfig, ModelSpec
from executor_svc.torch_engine.kv_cache import KVCache, PagedKVCache

_FLASH_BLOCK = 256  # FlashAttention 2 takes pages of multiples of it only
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_BY_PREFERENCE: tuple[AttentionName, ...] = ("flash", "triton", "torch")


def choose_backend(
    config: EngineConfig, device: torch.device, dtypes: Collection[torch.dtype]
) -> AttentionName:
    """The backend for models of these dtypes; ValueError if the setting's one cannot work."""
    wanted = config.attention_backend
    if wanted != "auto":
        problem = _problem(wanted, config, device, dtypes)
        if problem is not None:
            raise ValueError(f"attention_backend: {wanted} {problem}")
        return wanted
    for name in _BY_PREFERENCE:
        if _problem(name, config, device, dtypes) is None:
            return name
    return "cpu"  # it runs wherever torch does


def make_attention(
    spec: ModelSpec,
    config: EngineConfig,
    *,
    num_blocks: int,
    device: torch.device,
) -> AttentionBackend:
    """The backend that ``config`` names, with a KV cache of its own for one model.

    The name is one that ``choose_backend`` gave. With tensor parallelism ``spec`` counts the heads
    of this process.
    """
    name, num_heads, block_size = config.attention_backend, spec.num_heads, config.block_size
    assert name != "auto"
    if name == "cpu":
        from executor_svc.torch_engine.attention.cpu import CpuAttention

        cpu_cache = KVCache(spec, num_blocks=num_blocks, block_size=block_size, device=device)
        return CpuAttention(cpu_cache, num_heads=num_heads, windows=spec.windows)
    cache = PagedKVCache(
        num_layers=spec.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        device=device,
    )
    if name == "reference":
        from executor_svc.torch_engine.attention.reference import ReferenceAttention

        return ReferenceAttention(cache, windows=spec.windows)
    limits = StepLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_tokens=config.max_num_batched_tokens,
        max_context_tokens=min(
            config.max_model_len or spec.max_context_tokens,
            spec.max_context_tokens,
            num_blocks * block_size,
        ),
    )
    if name == "triton":
        from executor_svc.torch_engine.attention.triton_paged import TritonAttention

        has_flash = device.type == "cuda" and spec.dtype in _FLASH_DTYPES
        return TritonAttention(
            cache,
            num_heads=num_heads,
            windows=spec.windows,
            limits=limits,
            prefills_with_flash=has_flash and not config.exact_mode,
        )
    if name == "torch":
        from executor_svc.torch_engine.attention.torch_flash import TorchFlashAttention

        return TorchFlashAttention(cache, windows=spec.windows, limits=limits)
    from executor_svc.torch_engine.attention.flash_attn_pkg import FlashAttention

    return FlashAttention(cache, windows=spec.windows, limits=limits)


def _problem(
    name: AttentionName,
    config: EngineConfig,
    device: torch.device,
    dtypes: Collection[torch.dtype],
) -> str | None:
    """Why a backend cannot work, to go after its name."""
    if name in ("cpu", "reference"):
        return None
    if importlib.util.find_spec("triton") is None:  # the others store keys with it
        return "needs the triton package, which is not installed"
    if device.type != "cuda" and not (name == "triton" and _is_interpreting()):
        return f"needs a CUDA device; device is {device}"
    if name == "triton":
        return None
    if config.exact_mode:
        return "rounds prefill and decode differently; it needs exact_mode to be false"
    if config.block_size % _FLASH_BLOCK:
        return f"needs block_size to be a multiple of {_FLASH_BLOCK}; it is {config.block_size}"
    for dtype in dtypes:
        if dtype not in _FLASH_DTYPES:
            return f"needs dtype float16 or bfloat16; a model has {str(dtype)[6:]}"
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "needs the flash-attn package, which is not installed (install headway[cuda])"
    if name == "torch" and not _takes_block_tables():
        return f"needs torch 2.12 or newer; it is {torch.__version__}"
    return None


def _is_interpreting() -> bool:
    """Triton's kernels run in its interpreter, on the CPU: only tests want that."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _takes_block_tables() -> bool:
    """torch is new enough; with block tables came all that we need of ``varlen_attn``."""
    from torch.nn.attention.varlen import varlen_attn

    return "block_table" in inspect.signature(varlen_attn).parameters
