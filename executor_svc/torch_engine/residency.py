"""The models of an engine: what is known of each, where its weights are, and what fits.

Rule: the device has ``max_models`` places, and a place is a model's weights and its KV cache. All
places have the same share of the KV memory, so a model's context does not depend on its company.

Weights stay in host memory when a model leaves the device, so that its return is no load from
files: for a GPU they are pinned, and copied; on a CPU they are the model itself, and nothing is
held twice. Host memory is a cache: when it runs short, what has been away longest goes first.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from executor_svc.core.engine import ModelAssets, ModelInfo, ModelLoadError
from executor_svc.torch_engine.config import EngineConfig, ModelSpec, load_spec
from executor_svc.torch_engine.kv_cache import count_blocks, kv_bytes_per_model
from executor_svc.torch_engine.loader import Checkpoint, assets_digest, find_model, read_assets
from executor_svc.torch_engine.models.decoder import Decoder, tensor_shapes
from executor_svc.torch_engine.token_bytes import TokenBytes

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be served; its files are checked, its tensors not read."""

    spec: ModelSpec
    checkpoint: Checkpoint
    assets: ModelAssets
    token_bytes: TokenBytes | None  # None: it has no tokenizer
    weight_bytes: int
    num_blocks: int  # of its KV cache
    cache_bytes: int
    info: ModelInfo


class Residency:
    """Knows all models and keeps the weights of those that were loaded. Raises ModelError."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self.max_models = min(config.max_models or len(config.models), len(config.models))
        self._device = device
        folders = {name: find_model(source) for name, source in config.models}
        specs = {name: load_spec(folder, dtype=config.dtype) for name, folder in folders.items()}
        kv_bytes = kv_bytes_per_model(
            config,
            device,
            num_models=self.max_models,
            weight_bytes=max(_weight_bytes(spec, device) for spec in specs.values()),
        )
        self.models = {
            name: _know(name, folder, specs[name], config, device, kv_bytes)
            for name, folder in folders.items()
        }
        # of the largest model
        self.max_parameters = max(map(_num_parameters, specs.values()))
        self._host: dict[str, HostWeights] = {}  # also the present ones; the last to leave is last
        self._ms_per_byte: float | None = None  # of the last load from files

    def bring(self, name: str, resident: set[str]) -> Decoder:
        """A model's weights on the device, with memory left for its cache.

        Raises ModelLoadError where memory does not suffice.
        """
        model = self.models[name]
        if self._device.type != "cpu":
            _check_room(name, model.weight_bytes + model.cache_bytes, _free_bytes(self._device))
        weights = self._host.get(name)
        host_bytes = 0 if weights is not None else model.weight_bytes
        if self._device.type == "cpu":
            host_bytes += model.cache_bytes
        self._make_room(name, host_bytes, resident)
        if weights is None:
            weights = HostWeights(model.spec, model.checkpoint, self._device)
        self._host[name] = weights
        return weights.on_device()

    def leave(self, name: str) -> None:
        """A model is taken off the device."""
        self._host[name] = self._host.pop(name)

    def loaded(self, name: str, load_ms: int) -> None:
        """Remember how long that took."""
        model = self.models[name]
        if model.info.load_ms is None:  # its first load is from files
            self._ms_per_byte = load_ms / model.weight_bytes
        self.models[name] = replace(model, info=replace(model.info, load_ms=load_ms))

    def info(self, name: str, *, is_resident: bool) -> ModelInfo:
        """A model's description, with its load time as measured, or by its size."""
        model = self.models[name]
        load_ms = model.info.load_ms
        if load_ms is None and self._ms_per_byte is not None:
            load_ms = round(self._ms_per_byte * model.weight_bytes)
        return replace(model.info, is_resident=is_resident, load_ms=load_ms)

    def _make_room(self, name: str, num_bytes: int, resident: set[str]) -> None:
        """Drop weights of absent models until so much host memory is free."""
        free = _free_bytes(torch.device("cpu"))
        if free is None:
            return
        for absent in [other for other in self._host if other not in {name, *resident}]:
            if free >= num_bytes:
                break
            del self._host[absent]
            free += self.models[absent].weight_bytes
        _check_room(name, num_bytes, free)


class HostWeights:
    """A model's weights in host memory."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._decoder: Decoder | None = None
        self._tensors: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            return checkpoint.tensor(name).to(spec.dtype)

        if device.type == "cpu":
            self._decoder = Decoder(spec, read, device)
        else:
            self._tensors = {name: read(name).pin_memory() for name in tensor_shapes(spec)}

    def on_device(self) -> Decoder:
        """The model, ready to run."""
        if self._decoder is not None:
            return self._decoder
        return Decoder(
            self._spec,
            lambda name: self._tensors[name].to(self._device, non_blocking=True),
            self._device,
        )


def _know(
    name: str,
    folder: Path,
    spec: ModelSpec,
    config: EngineConfig,
    device: torch.device,
    kv_bytes: int,
) -> KnownModel:
    # A checkpoint whose head is tied may hold it a second time.
    ignored = ("lm_head.weight",) if spec.has_tied_head else ()
    checkpoint = Checkpoint(folder, tensor_shapes(spec), ignored=ignored)
    assets = read_assets(folder)
    num_blocks = count_blocks(config, spec, kv_bytes)
    return KnownModel(
        spec=spec,
        checkpoint=checkpoint,
        assets=assets,
        token_bytes=TokenBytes(assets.tokenizer_json) if assets.tokenizer_json else None,
        weight_bytes=_weight_bytes(spec, device),
        num_blocks=num_blocks,
        cache_bytes=num_blocks * config.block_size * spec.kv_bytes_per_token,
        info=ModelInfo(
            name=name,
            family=spec.family,
            vocab_size=spec.vocab_size,
            max_context_tokens=min(
                spec.max_context_tokens,
                config.max_model_len or spec.max_context_tokens,
                num_blocks * config.block_size,  # a sequence that is alone always fits
            ),
            eos_token_ids=spec.eos_token_ids,
            weights_digest=checkpoint.digest(),
            assets_digest=assets_digest(assets),
            dtype=str(spec.dtype).removeprefix("torch."),
        ),
    )


def _num_parameters(spec: ModelSpec) -> int:
    return sum(map(math.prod, tensor_shapes(spec).values()))


def _weight_bytes(spec: ModelSpec, device: torch.device) -> int:
    """What a model's weights take on the device."""
    num_weights = _num_parameters(spec)
    if spec.has_tied_head and device.type == "cpu":  # packed for the head, plain for the rest
        num_weights += math.prod(tensor_shapes(spec)["model.embed_tokens.weight"])
    return num_weights * spec.dtype.itemsize


def _free_bytes(device: torch.device) -> int | None:
    """Memory that can be had; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator holds without a use for it
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _check_room(name: str, num_bytes: int, free: int | None) -> None:
    if free is not None and num_bytes > free:
        raise ModelLoadError(
            f"{name}: weights and KV cache need {num_bytes >> 20} MiB, {free >> 20} MiB are free"
        )
