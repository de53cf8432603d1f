"""What is known of a model before it is loaded: shape, sizes, tokenizer, digests."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from executor_svc.core.engine import ModelAssets, ModelInfo
from executor_svc.torch_engine.config import EngineConfig, ModelSpec
from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.grammar import GrammarCompiler
from executor_svc.torch_engine.kv_cache import count_blocks
from executor_svc.torch_engine.loader import Checkpoint, assets_digest, read_assets
from executor_svc.torch_engine.models.sharding import Shard
from executor_svc.torch_engine.models.tensors import tensor_shapes
from executor_svc.torch_engine.token_bytes import TokenBytes


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be served; its files are checked, its tensors not read."""

    whole_spec: ModelSpec
    spec: ModelSpec  # of this rank's part
    checkpoint: Checkpoint
    assets: ModelAssets
    token_bytes: TokenBytes | None  # None: it has no tokenizer
    grammars: GrammarCompiler | None  # likewise
    weight_bytes: int  # of this rank's part
    num_blocks: int  # of its KV cache
    cache_bytes: int
    info: ModelInfo


def know_model(
    name: str,
    folder: Path,
    whole_spec: ModelSpec,
    shard: Shard,
    *,
    config: EngineConfig,
    device: torch.device,
    kv_bytes: int,
) -> KnownModel:
    """Check a model's files; ``kv_bytes`` is the memory for its cache. Raises ModelError."""
    # A checkpoint whose head is tied may hold it a second time.
    ignored = ("lm_head.weight",) if whole_spec.has_tied_head else ()
    checkpoint = Checkpoint(folder, tensor_shapes(whole_spec), ignored=ignored)
    assets = read_assets(folder)
    spec = shard.spec(whole_spec)
    num_blocks = count_blocks(config, spec, kv_bytes)
    return KnownModel(
        whole_spec=whole_spec,
        spec=spec,
        checkpoint=checkpoint,
        assets=assets,
        token_bytes=_token_bytes(folder, assets.tokenizer_json, whole_spec.vocab_size),
        grammars=_grammars(assets.tokenizer_json, whole_spec, config),
        weight_bytes=weight_bytes(whole_spec, shard, device, config.quantization),
        num_blocks=num_blocks,
        cache_bytes=num_blocks * config.block_size * spec.kv_bytes_per_token,
        info=ModelInfo(
            name=name,
            family=whole_spec.family,
            vocab_size=whole_spec.vocab_size,
            max_context_tokens=min(
                whole_spec.max_context_tokens,
                config.max_model_len or whole_spec.max_context_tokens,
                num_blocks * config.block_size,  # a sequence that is alone always fits
            ),
            eos_token_ids=whole_spec.eos_token_ids,
            # Only rank 0 tells anybody, and reading all the files takes its time.
            weights_digest=checkpoint.digest() if shard.rank == 0 else "",
            assets_digest=assets_digest(assets),
            dtype=str(whole_spec.dtype).removeprefix("torch."),
        ),
    )


def num_parameters(spec: ModelSpec) -> int:
    """Of the whole checkpoint."""
    return sum(map(math.prod, tensor_shapes(spec).values()))


def weight_bytes(spec: ModelSpec, shard: Shard, device: torch.device, quantization: str) -> int:
    """What a rank's part of the weights takes on the device."""
    total = 0
    for name, shape in tensor_shapes(spec).items():
        count = math.prod(shard.part_shape(name, shape))
        wide = count * spec.dtype.itemsize
        packed = count if quantization == "int8" else wide
        is_product = name.endswith("_proj.weight") or name == "lm_head.weight"
        total += packed if is_product else wide
        if name == "model.embed_tokens.weight" and spec.has_tied_head and device.type == "cpu":
            total += packed  # for the head; the plain one is for looking up
    return total


def _token_bytes(folder: Path, tokenizer_json: bytes, vocab_size: int) -> TokenBytes | None:
    if not tokenizer_json:
        return None
    token_bytes = TokenBytes(tokenizer_json)
    if token_bytes.max_token_id >= vocab_size:
        raise ModelError(
            f"{folder / 'tokenizer.json'}: token id {token_bytes.max_token_id} is beyond the "
            f"model's vocabulary of {vocab_size}"
        )
    return token_bytes


def _grammars(
    tokenizer_json: bytes, spec: ModelSpec, config: EngineConfig
) -> GrammarCompiler | None:
    if not tokenizer_json:
        return None
    return GrammarCompiler(
        tokenizer_json,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        limits=config.grammar_limits,
    )
