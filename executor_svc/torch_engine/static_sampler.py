"""The sampler of decode steps that are graphs: the same kernels every time, on buffers that stay.

What ``sampler.sample`` does on a GPU for rows that want no more than temperature, cuts and a draw,
with the same bits. Nothing here depends on a number that the host would have to know, so it can be
captured; rows that want more go through ``sample``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from executor_svc.torch_engine.draws import scaled
from executor_svc.torch_engine.sampler import Row, Sampled, host_wishes, logprobs_of
from executor_svc.torch_engine.staging import Staging
from executor_svc.torch_engine.wishes import (
    IS_DRAWN,
    NUM_FLOATS,
    NUM_INTS,
    TEMPERATURE,
    Wishes,
)


class StaticSampler:
    """Buffers for the wishes of ``max_rows`` rows."""

    def __init__(self, max_rows: int, staging: Staging, device: torch.device) -> None:
        self._staging = staging
        self._ints = torch.zeros(max_rows * NUM_INTS, dtype=torch.int64, device=device)
        self._floats = torch.ones(max_rows * NUM_FLOATS, dtype=torch.float64, device=device)

    def fill(self, rows: Sequence[Row], indices: Sequence[int], num_rows: int) -> None:
        """The wishes of the next step's rows, filled up to ``num_rows`` with greedy ones."""
        ints, floats = host_wishes(rows, indices).with_dummies(num_rows)
        self._staging.copy(ints.ravel(), out=self._ints)
        self._staging.copy(floats.ravel(), out=self._floats)

    def sample(self, logits: Tensor) -> Sampled:  # [rows, vocab]
        """Draw a token for each row."""
        from executor_svc.torch_engine.kernels.sampling import draw, totals

        num_rows = logits.shape[0]
        wishes = Wishes(
            self._ints.view(-1, NUM_INTS)[:num_rows], self._floats.view(-1, NUM_FLOATS)[:num_rows]
        )
        logits = logits.float()
        temperature = wishes.floats[:, TEMPERATURE, None].float()
        probs = scaled(logits, temperature).exp_()
        is_drawn = wishes.ints[:, IS_DRAWN] > 0
        token_ids = torch.where(is_drawn, draw(probs, wishes), logits.argmax(-1))
        log_total = totals(probs).log()
        logprobs = logprobs_of(logits, token_ids[:, None], log_total, temperature)[:, 0]
        return Sampled(token_ids, logprobs)
