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
from executor_svc.torch_engine.kv_cache import kv_slots
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


# Around tiles of 64 and chunks of 256 keys, and around blocks of 16.
@pytest.mark.parametrize("window", [1, 16, 21, 63, 64, 65, 256, 257, 1000])
def test_a_window_equals_its_definition(window: int) -> None:
    shape = Shape(16, 2, 16, torch.float32, window)
    chunks = (Chunk(0, 1, 300), Chunk(1, 1, 0), Chunk(2, 1, 1), Chunk(3, 35, 290), Chunk(4, 20, 20))
    assert max_error(Case(shape, CPU, chunks)) < MAX_ERROR[torch.float32]


@pytest.mark.parametrize(
    ("window", "dtype"), [(3, torch.float16), (64, torch.float32), (200, torch.float16)]
)
def test_a_window_lets_neither_company_nor_chunks_change_a_bit(
    window: int, dtype: torch.dtype
) -> None:
    shape = Shape(64, 2, 16, dtype, window)
    chunks = (Chunk(0, 1, 1), Chunk(1, 1, 300), Chunk(2, 1, 0), Chunk(3, 3, 257), Chunk(4, 5, 5))
    assert is_same_alone(Case(shape, CPU, chunks))
    # The second one's first rows see a chunk of keys that its last ones do not.
    later = (Chunk(0, 3, 258), Chunk(1, 8, 256 + window + 3))
    assert is_same_replayed(Case(shape, CPU, later))


@pytest.mark.parametrize("num_new", [1, 3])
def test_tiles_of_keys_before_the_window_are_not_read(num_new: int) -> None:
    window, context = 70, 600
    case = Case(Shape(16, 2, 16, torch.float32, window), CPU, (Chunk(0, num_new, context),))
    wanted = case.run(case.triton(), case.chunks, torch.float32)
    backend = case.triton()
    first_seen = context - num_new - window + 1
    slots = kv_slots(case.tables[0], 0, first_seen // 64 * 64, 16)
    for part in (backend._cache.keys, backend._cache.values):
        part.flatten(1, 2)[0, slots] = torch.nan
    assert torch.equal(case.run(backend, case.chunks, torch.float32), wanted)


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
