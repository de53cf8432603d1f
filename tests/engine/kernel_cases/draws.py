"""Draws: the kernels draw the tokens that the definition draws."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.core.engine import SamplingParams
from executor_svc.torch_engine.sampler import Row, SamplingBatch, sample
from executor_svc.torch_engine.staging import Staging
from executor_svc.torch_engine.static_sampler import StaticSampler
from tests.engine.kernel_cases.interpreter import CPU

ROWS = 6


def _odds(vocab: int) -> Tensor:
    """Sharp rows and flat ones, and one with many ties."""
    draw = torch.Generator().manual_seed(vocab)
    widths = torch.tensor([6.0, 0.1, 3.0, 1.0, 4.0, 2.0])[:, None]
    logits = torch.randn(ROWS, vocab, generator=draw) * widths
    logits[3] = logits[3].round()
    return logits


def _row(params: SamplingParams, sample: int) -> Row:
    return Row.of(params, sample, ())


# The last one has three parts.
@pytest.mark.parametrize("vocab", [5, 320, 9001])
@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.9999},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.5},
        {"top_k": 1000, "top_p": 0.99, "min_p": 0.02},
    ],
    ids=str,
)
def test_a_gpu_draws_the_tokens_that_the_definition_draws(vocab: int, cuts: dict[str, Any]) -> None:
    logits = _odds(vocab)
    params = SamplingParams(1, seed=(7 << 40) + 3, temperature=0.9, **cuts)
    rows = [_row(replace(params, seed=params.seed * i), i % 2) for i in range(ROWS - 1)]
    rows.append(_row(replace(params, temperature=0.0), 0))
    indices = [11 * i for i in range(ROWS)]
    wanted = sample(logits, SamplingBatch(rows, indices))
    by_kernels = sample(logits, SamplingBatch(rows, indices, with_kernels=True))
    assert torch.equal(by_kernels.token_ids, wanted.token_ids)
    assert torch.allclose(by_kernels.logprobs, wanted.logprobs, atol=1e-6)
    static = StaticSampler(8, Staging(CPU), CPU)
    static.fill(rows, indices, 8)
    dummies = torch.zeros(8 - ROWS, vocab)
    captured = static.sample(torch.cat([logits, dummies]))
    assert torch.equal(captured.token_ids[:ROWS], by_kernels.token_ids)
    assert torch.equal(captured.logprobs[:ROWS], by_kernels.logprobs)
    # Alone, a row has the bits that it has in company.
    static.fill(rows[2:3], indices[2:3], 1)
    alone = static.sample(logits[2:3])
    assert torch.equal(alone.token_ids, captured.token_ids[2:3])
    assert torch.equal(alone.logprobs, captured.logprobs[2:3])


def test_rows_that_are_no_numbers_upset_nobody() -> None:
    logits = _odds(320)
    params = SamplingParams(1, top_k=5, top_p=0.9, seed=3)
    rows, indices = [_row(params, i) for i in range(ROWS)], [0] * ROWS
    wanted = sample(logits, SamplingBatch(rows, indices))
    logits[1] = torch.nan
    got = sample(logits, SamplingBatch(rows, indices, with_kernels=True))
    assert got.logprobs[1].isnan()
    others = [0, *range(2, ROWS)]
    assert torch.equal(got.token_ids[others], wanted.token_ids[others])
    assert 0 <= int(got.token_ids[1]) < 320
