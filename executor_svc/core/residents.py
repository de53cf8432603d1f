"""Which models are on the device, as far as the scheduler may count on it.

Rule: a model is absent, on its way, or resident. It is absent from the moment that the order to
evict it is taken, and resident once the engine said so; at most ``max_models`` are resident or on
their way, and a model has one load under way at most. Residency is a state: what changed is told
once on the present stream, and the hello of the next stream tells all of it again.
"""

from collections.abc import Container, Iterable
from dataclasses import replace

from executor_svc.core.engine import ModelInfo
from executor_svc.core.messages import LoadOrder, ModelChange, ModelState


class Residents:
    """The session's books of the models that the executor offers."""

    def __init__(self, models: Iterable[ModelInfo], max_models: int) -> None:
        self.max_models = max_models
        self._models = {model.name: model for model in models}
        self._loading: set[str] = set()
        self._changes: list[ModelChange] = []  # since the last hello, not told yet
        assert len(self._present()) <= max_models

    def offers(self) -> tuple[ModelInfo, ...]:
        """What a hello is to list; changes from here on go into reports."""
        self._changes.clear()
        return tuple(
            replace(model, is_loading=name in self._loading) for name, model in self._models.items()
        )

    def take_changes(self) -> tuple[ModelChange, ...]:
        """What changed since this or ``offers`` was called; counts as told."""
        changes = tuple(self._changes)
        self._changes.clear()
        return changes

    def can_take(self, model: str) -> bool:
        """Whether to hand a lease to the engine, which itself refuses models of other names."""
        return model not in self._models or self._models[model].is_resident

    def tell_absent(self, model: str) -> None:
        """The scheduler took the model for resident, which it is not."""
        if model not in self._loading:
            self._changes.append(ModelChange(model, ModelState.ABSENT))

    def order(self, load: LoadOrder, busy: Container[str]) -> bool:
        """Whether to hand this order to the engine; else it is answered already.

        ``busy`` are the models that leases run on.
        """
        if load.model in self._loading:
            return False  # said twice: its end will be the answer
        if load.model in self._models and self._models[load.model].is_resident:
            self._tell_resident(load.model)
            return False
        if fault := self._fault(load, busy):
            self.refuse(load, fault)
            return False
        for name in load.evict:
            self._models[name] = replace(self._models[name], is_resident=False)
            self._changes.append(ModelChange(name, ModelState.ABSENT))
        self._loading.add(load.model)
        return True

    def refuse(self, load: LoadOrder, message: str) -> None:
        """Answer an order that is not carried out; nothing is evicted.

        Whoever gives such an order has a wrong idea of what is here, so that is told too.
        """
        for model in self._models.values():
            if model.is_resident:
                self._tell_resident(model.name)
        self._changes.append(ModelChange(load.model, ModelState.FAILED, message=message))

    def loaded(self, model: str, load_ms: int, exactness_class: str) -> None:
        """The engine has put the model on the device."""
        self._loading.remove(model)
        self._models[model] = replace(
            self._models[model],
            is_resident=True,
            load_ms=load_ms,
            exactness_class=exactness_class,
        )
        self._tell_resident(model, load_ms)

    def failed(self, model: str, message: str) -> None:
        """The engine could not load the model."""
        self._loading.remove(model)
        self._changes.append(ModelChange(model, ModelState.FAILED, message=message))

    def _tell_resident(self, model: str, load_ms: int | None = None) -> None:
        exactness_class = self._models[model].exactness_class
        self._changes.append(
            ModelChange(model, ModelState.RESIDENT, load_ms, exactness_class=exactness_class)
        )

    def _present(self) -> set[str]:
        """Models that take a place on the device."""
        return self._loading | {m.name for m in self._models.values() if m.is_resident}

    def _fault(self, load: LoadOrder, busy: Container[str]) -> str | None:
        for name in (load.model, *load.evict):
            if name not in self._models:
                return f"{name} is not offered here"
        for name in load.evict:
            if name in self._loading:
                return f"{name} is being loaded and cannot be evicted"
            if name in busy:
                return f"{name} has running leases and cannot be evicted"
        if len(self._present() - set(load.evict)) >= self.max_models:
            return f"max_models is {self.max_models}, and too few models are evicted"
        return None
