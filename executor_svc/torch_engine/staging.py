"""Host arrays on their way to the device, without making the host wait.

Rule: a copy to a GPU leaves from pinned memory and is not waited for. A pinned buffer is written
again only when the copies that read it have ended: there are two of them, used in turn, and each
remembers an event behind its last copy. (Under overlap, a buffer that is written while it is read
is an illegal access some steps later, far from its cause.) On the CPU there is nothing to do: an
array is its tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; of any dtype
_MIN_BUFFER_BYTES = 1 << 16


class Staging:
    """Copies arrays to one device, step by step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sets = [PinnedSet(), PinnedSet()] if device.type == "cuda" else []
        self._current = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the copies of a step; waits if those of the step before the last still run."""
        if not self._sets:
            yield
            return
        self._current = 1 - self._current
        pinned = self._sets[self._current]
        pinned.reuse()
        try:
            yield
        finally:
            pinned.mark()

    def copy(self, array: np.ndarray, out: Tensor | None = None) -> Tensor:
        """The array on the device, in a new tensor or at the beginning of ``out``, which is 1-d."""
        tensor = torch.from_numpy(array)
        if self._sets:
            tensor = self._sets[self._current].hold(tensor)
        if out is None:
            return tensor.to(self._device, non_blocking=True)
        return out[: len(array)].copy_(tensor, non_blocking=True)


def _allocate_pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class PinnedSet:
    """A pinned buffer, handed out from its beginning; it grows to what a step needs."""

    def __init__(self, allocate: Callable[[int], Tensor] = _allocate_pinned) -> None:
        self._allocate = allocate
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._num_used = 0
        self._ended: torch.cuda.Event | None = None

    def reuse(self) -> None:
        if self._ended is not None:
            self._ended.synchronize()
        self._num_used = 0

    def hold(self, tensor: Tensor) -> Tensor:
        """A pinned copy, which stays until the set is used again."""
        num_bytes = tensor.numel() * tensor.element_size()
        start = -(-self._num_used // _ALIGNMENT) * _ALIGNMENT
        if start + num_bytes > len(self._buffer):
            # Copies from the old buffer may still run: torch gives pinned memory back only after
            # them.
            size = max(2 * len(self._buffer), num_bytes, _MIN_BUFFER_BYTES)
            self._buffer, start = self._allocate(size), 0
        self._num_used = start + num_bytes
        pinned = self._buffer[start : self._num_used].view(tensor.dtype).view(tensor.shape)
        return pinned.copy_(tensor)

    def mark(self) -> None:
        self._ended = torch.cuda.Event()
        self._ended.record()
