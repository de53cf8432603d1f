"""What the rows of a step want of their draws, as two arrays that go to a GPU in one copy each.

The sampler of a GPU (``kernels/sampling.py``) reads them there: whether and how a row is drawn is
decided on the device, so one captured graph serves every mixture of greedy and sampled rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from executor_svc.torch_engine.draws import temperatures

# Columns of ``ints``; a greedy row has IS_DRAWN 0. The seed's 64 bits are taken as they are.
NUM_INTS = 5
IS_DRAWN, SEED, INDEX, SAMPLE, TOP_K = range(NUM_INTS)
# Columns of ``floats``.
NUM_FLOATS = 3
TEMPERATURE, TOP_P, MIN_P = range(NUM_FLOATS)


class HostWishes(NamedTuple):
    """int64 [rows, NUM_INTS] and float64 [rows, NUM_FLOATS]."""

    ints: np.ndarray
    floats: np.ndarray

    @staticmethod
    def of(
        values: Sequence[float],  # temperatures, as asked for
        cuts: Sequence[tuple[int, float, float]],  # top_k, top_p, min_p
        keys: Sequence[tuple[int, int]],  # low and high word of each seed
        places: Sequence[tuple[int, int]],  # number of the token, number of the sample
    ) -> "HostWishes":
        ints = np.zeros((len(values), NUM_INTS), dtype=np.int64)
        floats = np.zeros((len(values), NUM_FLOATS))
        if not len(values):
            return HostWishes(ints, floats)
        ints[:, IS_DRAWN] = np.asarray(values) > 0
        words = np.array(keys, dtype=np.uint64)
        ints[:, SEED] = (words[:, 0] | words[:, 1] << np.uint64(32)).view(np.int64)
        ints[:, INDEX : SAMPLE + 1] = places
        top_k, floats[:, TOP_P], floats[:, MIN_P] = zip(*cuts, strict=True)
        ints[:, TOP_K] = np.minimum(top_k, np.iinfo(np.int32).max)
        floats[:, TEMPERATURE] = temperatures(values)[:, 0]
        return HostWishes(ints, floats)

    def with_dummies(self, num_rows: int) -> "HostWishes":
        """Filled up with greedy rows."""
        ints = np.zeros((num_rows, NUM_INTS), dtype=np.int64)
        floats = np.ones((num_rows, NUM_FLOATS))
        ints[: len(self.ints)], floats[: len(self.floats)] = self
        return HostWishes(ints, floats)


class Wishes(NamedTuple):
    """The same on the device."""

    ints: Tensor
    floats: Tensor
