"""Attention: equal to its definition, and with bits that depend on nothing else."""

from dataclasses import replace

import pytest
import torch

from bench.kernels import (
    PREFILLS,
    STEP,
    Case,
    Chunk,
    Shape,
    is_same_alone,
    is_same_replayed,
    max_error,
)
from tests.engine.kernel_cases.interpreter import CPU

MAX_ERROR = {torch.float32: 3e-6, torch.float16: 2e-3}


@pytest.mark.parametrize(
    "shape",
    # the families' heads, and what needs padding: 80 dims, 7 and 3 heads in a group, odd blocks
    [
        Shape(128, 4, 16, torch.float16),
        Shape(64, 8, 256, torch.float32),
        Shape(96, 1, 64, torch.float16),
        Shape(80, 7, 32, torch.float32),
        Shape(128, 3, 5, torch.float32),
        Shape(256, 2, 16, torch.float16),
    ],
    ids=str,
)
def test_attention_equals_its_definition(shape: Shape) -> None:
    assert max_error(Case(shape, CPU)) < MAX_ERROR[shape.dtype]


def test_more_heads_than_a_tile_has_rows() -> None:
    shape = Shape(16, 40, 16, torch.float32)
    chunks = (Chunk(0, 1, 300), Chunk(1, 3, 20))
    assert max_error(Case(shape, CPU, chunks)) < MAX_ERROR[torch.float32]


@pytest.mark.parametrize("dtype", MAX_ERROR)
def test_company_does_not_change_a_bit(dtype: torch.dtype) -> None:
    chunks = (Chunk(0, 1, 1), Chunk(1, 1, 300), Chunk(2, 1, 0), Chunk(3, 3, 257), Chunk(4, 5, 5))
    assert is_same_alone(Case(Shape(64, 4, 16, dtype), CPU, chunks))


@pytest.mark.parametrize("dtype", MAX_ERROR)
def test_prefill_has_the_bits_of_decode(dtype: torch.dtype) -> None:
    assert is_same_replayed(Case(Shape(64, 4, 16, dtype), CPU, PREFILLS[:2]))


def test_keys_are_stored_where_they_belong_and_nowhere_else() -> None:
    case = Case(Shape(64, 2, 16, torch.float32), CPU)
    backend = case.triton()
    before = backend._cache.keys.clone()
    case.run(backend, [replace(chunk, context=0, num_new=1) for chunk in STEP], torch.float32)
    assert torch.equal(backend._cache.keys.nan_to_num(7), before.nan_to_num(7))
    backend._cache.keys.fill_(0)
    case.run(backend, [Chunk(5, 5, 5)], torch.float32)
    slot = case.tables[5][0] * 16
    stored = backend._cache.keys[0].flatten(0, 1)
    assert torch.equal(stored[slot : slot + 5], case.rows[5][1])
    assert torch.count_nonzero(stored) == torch.count_nonzero(stored[slot : slot + 5])
