"""What the ranks of a divided model say to each other inside a step."""

from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """One rank's side; every rank makes the same calls in the same order."""

    rank: int
    size: int

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, on each of them."""
        ...

    def gather(self, x: Tensor) -> Tensor:  # [rows, columns] -> [rows, size * columns]
        """All ranks' ``x`` side by side, on rank 0; the others get something of no use."""
        ...


class _Alone:
    """An undivided model."""

    rank, size = 0, 1

    def reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x


ALONE = _Alone()
