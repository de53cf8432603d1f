"""What the backends on a paged cache have in common: how keys and values get there."""

from abc import ABC, abstractmethod

from torch import Tensor

from executor_svc.torch_engine.attention.base import StoreTarget
from executor_svc.torch_engine.kernels.kv_store import store_kv
from executor_svc.torch_engine.kv_cache import PagedKVCache
from executor_svc.torch_engine.windows import Windows


class PagedBackend(ABC):
    """``run`` stores and attends; a decoder may store on its own, and then just ``attend``."""

    def __init__(self, cache: PagedKVCache, windows: Windows) -> None:
        self._cache, self._windows = cache, windows

    @property
    def paged(self) -> "PagedBackend":
        return self

    @property
    @abstractmethod
    def slots(self) -> Tensor:
        """Where the step's keys and values go, [tokens]; always at the same address."""

    @abstractmethod
    def attend(self, layer_index: int, q: Tensor) -> Tensor:
        """Attention over what is stored; see ``AttentionBackend.run``."""

    def target(self, layer_index: int) -> StoreTarget:
        keys, values = self._cache.keys[layer_index], self._cache.values[layer_index]
        return StoreTarget(self.slots, keys, values)

    def run(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store_kv(k, v, *self.target(layer_index))
        return self.attend(layer_index, q)
