"""The models of an engine: what is known of each, where its weights are, and what fits.

Rule: the device has ``max_models`` places, and a place is a model's weights and its KV cache. All
places have the same share of the KV memory, so a model's context does not depend on its company.

Weights stay in host memory when a model leaves the device, so that its return is no load from
files (host_weights.py). Host memory is a cache: when it runs short, what has been away longest goes
first.
"""

from dataclasses import replace
from pathlib import Path

import torch

from executor_svc.core.engine import ModelInfo, ModelLoadError
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.host_weights import HostWeights, WeightSource
from executor_svc.torch_engine.known_model import (
    know_model,
    num_parameters,
    weight_bytes,
)
from executor_svc.torch_engine.kv_cache import kv_bytes_per_model
from executor_svc.torch_engine.loader import find_model
from executor_svc.torch_engine.model_config import load_spec
from executor_svc.torch_engine.models.collectives import ALONE, Collectives
from executor_svc.torch_engine.models.decoder import Model
from executor_svc.torch_engine.models.sharding import Shard
from executor_svc.torch_engine.tensor_parallel import LeadingDecoder, Ranks

_ONE_THREAD_PARAMETERS = 100_000_000  # see EngineConfig
_MEMINFO = Path("/proc/meminfo")


class Residency:
    """Knows all models and keeps the weights of those that were loaded. Raises ModelError."""

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        *,
        collectives: Collectives = ALONE,
        ranks: Ranks | None = None,
    ) -> None:
        """``collectives`` are those of this rank; ``ranks`` are the others, for rank 0."""
        self.max_models = min(config.max_models or len(config.models), len(config.models))
        self._config, self._device, self._ranks = config, device, ranks
        self._collectives = ranks.group if ranks is not None else collectives
        shard = Shard(self._collectives.rank, self._collectives.size)
        folders = {name: find_model(source) for name, source in config.models}
        specs = {
            name: load_spec(folder, dtype=config.dtype, max_model_len=config.max_model_len)
            for name, folder in folders.items()
        }
        # memory for the cache of each model
        self.kv_bytes = kv_bytes_per_model(
            config,
            device,
            num_models=self.max_models,
            weight_bytes=max(
                weight_bytes(spec, shard, device, config.quantization) for spec in specs.values()
            ),
        )
        if ranks is not None:
            self.kv_bytes = min(self.kv_bytes, ranks.least_kv_bytes())
        self.models = {
            name: know_model(
                name,
                folder,
                specs[name],
                shard,
                config=config,
                device=device,
                kv_bytes=self.kv_bytes,
            )
            for name, folder in folders.items()
        }
        self._max_parameters = max(map(num_parameters, specs.values()))
        self._host: dict[str, HostWeights] = {}  # also the present ones; the last to leave is last
        self._ms_per_byte: float | None = None  # of the last load from files

    @property
    def num_threads(self) -> int | None:
        """Threads that torch should have (EngineConfig); None leaves them to torch."""
        if self._max_parameters < _ONE_THREAD_PARAMETERS:
            return self._config.num_threads or 1
        return self._config.num_threads

    def bring(self, name: str, resident: set[str]) -> Model:
        """A model's weights on the device, with memory left for its cache.

        Raises ModelLoadError where memory does not suffice.
        """
        if self._ranks is None:
            return self._bring(name, resident)
        self._ranks.load(name, self.models[name].num_blocks, resident)
        try:
            decoder = self._bring(name, resident)
        finally:
            self._ranks.wait_loaded()
        return LeadingDecoder(decoder, self._ranks, name)

    def _bring(self, name: str, resident: set[str]) -> Model:
        """This rank's part of it."""
        model = self.models[name]
        if self._device.type != "cpu":
            _check_room(name, model.weight_bytes + model.cache_bytes, _free_bytes(self._device))
        source = WeightSource(model, self._device, self._config, self._collectives)
        if self._device.type != "cpu" and self.max_models == len(self.models):
            return source.from_files()  # it never has to leave
        weights = self._host.get(name)
        host_bytes = 0 if weights is not None else model.weight_bytes
        if self._device.type == "cpu":
            host_bytes += model.cache_bytes
        self._make_room(name, host_bytes, resident)
        if weights is None:
            weights = HostWeights(source)
        self._host[name] = weights
        return weights.on_device()

    def leave(self, name: str) -> None:
        """A model is taken off the device."""
        if name in self._host:
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
