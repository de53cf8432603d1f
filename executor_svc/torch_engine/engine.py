"""The engine that runs models itself: step() = schedule, run, postprocess, for each of them."""

import time
from dataclasses import replace

import torch

from executor_svc.core.engine import (
    InvalidLeaseError,
    LeaseRequest,
    ModelAssets,
    ModelInfo,
    ModelLoadError,
    StepOutput,
)
from executor_svc.torch_engine.attention.choice import choose_backend
from executor_svc.torch_engine.config import EngineConfig, find_device
from executor_svc.torch_engine.exactness import exactness_class, prepare
from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.rank import start_ranks
from executor_svc.torch_engine.residency import Residency
from executor_svc.torch_engine.resident import ResidentModel
from executor_svc.torch_engine.tensor_parallel import RankDiedError
from headway.reasons import Reason


class TorchEngine:
    """Serves models with torch. Building it loads the first max_models, or raises ModelError."""

    def __init__(self, config: EngineConfig) -> None:
        self._device = find_device(config.device)
        if config.exact_mode:
            prepare(self._device)
        self._resident: dict[str, ResidentModel] = {}  # at most max_models
        self._classes: dict[str, str] = {}  # of models that were loaded, see exactness.py
        self._ranks = start_ranks(config)
        try:
            self._start(config)
        except BaseException:
            self.close()
            raise

    def _start(self, config: EngineConfig) -> None:
        """Get to know all models and load the first ones."""
        try:
            self._residency = Residency(config, self._device, ranks=self._ranks)
            dtypes = {model.spec.dtype for model in self._residency.models.values()}
            self._config = replace(
                config, attention_backend=choose_backend(config, self._device, dtypes)
            )
            if self._residency.num_threads is not None:
                torch.set_num_threads(self._residency.num_threads)
            for name in list(self._residency.models)[: self.max_models]:
                self.load(name, ())
        except (ModelLoadError, RankDiedError) as error:
            raise ModelError(str(error)) from error

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return tuple(
            replace(
                self._residency.info(name, is_resident=name in self._resident),
                exactness_class=self._classes.get(name, ""),
            )
            for name in self._residency.models
        )

    @property
    def attention_backend(self) -> str:
        """The backend in use, by its name in the settings."""
        return self._config.attention_backend

    @property
    def num_preemptions(self) -> int:
        """How often a sequence lost its blocks to an older one, since its model was loaded."""
        return sum(model.num_preemptions for model in self._resident.values())

    @property
    def num_slots(self) -> int:
        return self._config.max_num_seqs

    @property
    def max_models(self) -> int:
        return self._residency.max_models

    def load(self, model: str, evict: tuple[str, ...]) -> int:
        started_s = time.monotonic()
        for name in evict:
            assert not self._resident[name].has_work()
            del self._resident[name]
            self._residency.leave(name)
        assert model not in self._resident
        assert len(self._resident) < self.max_models
        try:
            brought = self._residency.bring(model, set(self._resident))
            known = self._residency.models[model]
            resident = ResidentModel(known, brought, self._config, self._device)
            if self._config.exact_mode and model not in self._classes:
                self._classes[model] = exactness_class(
                    resident, known.info, self._config, self._device
                )
            self._resident[model] = resident
        except (ModelLoadError, RankDiedError):
            raise
        except Exception as fault:  # files that changed, memory that others took
            raise ModelLoadError(f"{model}: {fault!r}") from fault
        load_ms = round((time.monotonic() - started_s) * 1000)
        self._residency.loaded(model, load_ms)
        return load_ms

    def assets(self, model: str) -> ModelAssets:
        """The files of a model, by its served name."""
        return self._residency.models[model].assets

    def has_work(self) -> bool:
        return any(model.has_work() for model in self._resident.values())

    def close(self) -> None:
        """Forget all leases; memory goes with the engine itself."""
        for model in self._resident.values():
            model.close()
        if self._ranks is not None:
            self._ranks.close()

    def add(self, request: LeaseRequest) -> None:
        """Take a lease; raises InvalidLeaseError and then holds nothing of it."""
        if request.model not in self._residency.models:
            raise InvalidLeaseError(
                Reason.MODEL_NOT_FOUND, f"model {request.model!r} is not served here"
            )
        self._resident[request.model].add(request)

    def abort(self, key: int) -> None:
        for model in self._resident.values():
            model.abort(key)

    def step(self) -> StepOutput:
        """One batch of each model that has work, one model after the other."""
        output = StepOutput()
        for model in self._resident.values():
            model.step(output)
        return output
