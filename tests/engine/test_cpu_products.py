"""Attention by products: what it computes, and that its bits do not depend on what is beside it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from executor_svc.torch_engine.attention import cpu_products
from executor_svc.torch_engine.attention.cpu import CpuAttention
from executor_svc.torch_engine.attention.cpu_products import (
    FusedAttend,
    ProductAttend,
    choose_attend,
)
from executor_svc.torch_engine.kv_cache import KVCache
from executor_svc.torch_engine.model_config import load_spec
from tests.engine.steps import layout_of

HEADS, CHUNKS, ROWS, WIDTH, DIM = 3, 5, 12, 192, 32
HAS_PRODUCTS = isinstance(choose_attend(torch.bfloat16), ProductAttend)

needs_products = pytest.mark.skipif(not HAS_PRODUCTS, reason="this CPU has no bfloat16 products")


def operands(width: int = WIDTH, *, sharpness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; the sharper, the larger the scores."""
    draw = torch.Generator().manual_seed(0)
    queries = sharpness * torch.randn(HEADS, CHUNKS, ROWS, DIM, generator=draw)
    keys, values = torch.randn(2, HEADS, CHUNKS, width, DIM, generator=draw)
    return queries.bfloat16(), keys.bfloat16(), values.bfloat16()


def mask(num_seen: Tensor, width: int) -> Tensor:  # [chunks, rows or 1]
    """Each row sees its first keys."""
    return torch.where(torch.arange(width) < num_seen[None, :, :, None], 0.0, -math.inf)


def causal(width: int) -> Tensor:
    first = torch.tensor([1, 2, 60, 150, WIDTH - ROWS + 1])
    return mask(first[:, None] + torch.arange(ROWS), width)


def definition(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    scores = queries.double() @ keys.double().mT / math.sqrt(DIM)
    return (scores + mask).softmax(-1) @ values.double()


@needs_products
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_products_attend_as_the_definition_does(sharpness: float) -> None:
    """At scores of 100 a score in bfloat16 would be off by up to a quarter."""
    queries, keys, values = operands(sharpness=sharpness)
    got = ProductAttend()(queries, keys, values, causal(WIDTH))
    wanted = definition(queries, keys, values, causal(WIDTH))
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.double(), wanted, rtol=2**-7, atol=2**-7)


@needs_products
def test_a_row_does_not_feel_rows_chunks_heads_or_keys_beside_it() -> None:
    attend = ProductAttend()
    wide = operands(1_024)
    whole = attend(*wide, causal(1_024))
    for width in (192, 256, 320, 640):
        queries, keys, values = wide[0], *(x[:, :, :width].contiguous() for x in wide[1:])
        seen = causal(width)
        assert torch.equal(attend(queries, keys, values, seen), whole)
        for rows in (slice(4), slice(4, 12)):
            part = attend(queries[:, :, rows], keys, values, seen[:, :, rows])
            assert torch.equal(part, whole[:, :, rows])
        for chunk in range(CHUNKS):
            one = slice(chunk, chunk + 1)
            part = attend(queries[:, one], keys[:, one], values[:, one], seen[:, one])
            assert torch.equal(part, whole[:, one])
        part = attend(queries[1:2], keys[1:2], values[1:2], seen)
        assert torch.equal(part, whole[1:2])


@needs_products
def test_more_scores_than_a_pass_may_have_go_by_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = *operands(), causal(WIDTH)
    whole = ProductAttend()(*arguments)
    passes: list[int] = []
    run = ProductAttend._pass

    def counted(attend: ProductAttend, queries: Tensor, *more: Tensor) -> Tensor:
        passes.append(len(queries))
        return run(attend, queries, *more)

    monkeypatch.setattr(ProductAttend, "_pass", counted)
    for max_scores, heads in ((2 * CHUNKS * ROWS * WIDTH, [2, 1]), (1, [1, 1, 1])):
        monkeypatch.setattr(cpu_products, "_MAX_SCORES", max_scores)
        passes.clear()
        assert torch.equal(ProductAttend()(*arguments), whole)
        assert passes == heads


@needs_products
def test_one_row_of_a_mask_may_be_for_all() -> None:
    queries, keys, values = operands()
    num_seen = torch.tensor([[1], [2], [60], [150], [WIDTH]])
    got = ProductAttend()(queries, keys, values, mask(num_seen, WIDTH))
    each = ProductAttend()(queries, keys, values, mask(num_seen.expand(-1, ROWS), WIDTH))
    assert torch.equal(got, each)


def test_products_are_for_bfloat16_alone() -> None:
    for dtype in (torch.float32, torch.float16):
        attend = choose_attend(dtype)
        assert isinstance(attend, FusedAttend)
        assert attend.mask_dtype == dtype


def test_a_cpu_without_such_products_attends_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert isinstance(choose_attend(torch.bfloat16), FusedAttend)


@pytest.mark.parametrize(
    ("attend", "widths"),
    [
        (FusedAttend(torch.float32), {1: 64, 64: 64, 65: 128, 193: 384, 385: 512, 513: 576}),
        (ProductAttend(), {1: 64, 64: 64, 65: 128, 193: 256, 513: 640, 1025: 1_280, 4_097: 5_120}),
    ],
)
def test_widths(attend: FusedAttend | ProductAttend, widths: dict[int, int]) -> None:
    assert {num_keys: attend.width(num_keys) for num_keys in widths} == widths


def test_products_have_few_shapes() -> None:
    attend = ProductAttend()
    assert {attend.rows(n) for n in range(1, 129)} == {4, 8, 16, 32, 64, 128}
    assert len({attend.width(n) for n in range(1, 4_097)}) == 20
    assert all(attend.rows(n) >= n for n in range(1, 129))
    assert all(attend.width(n) >= n for n in range(1, 4_097))


@needs_products
def test_an_engine_makes_few_shapes_of_products(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN keeps what it compiled for each: for a context of 1,024 tokens 6 x 12 and 3 x 12."""
    spec = replace(load_spec(qwen3), num_layers=1, windows=(None,), dtype=torch.bfloat16)
    cache = KVCache(spec, num_blocks=1, block_size=1_024, device=torch.device("cpu"))
    backend = CpuAttention(cache, num_heads=spec.num_heads, windows=spec.windows)
    shapes: set[tuple[int, ...]] = set()

    def noted(_: ProductAttend, queries: Tensor, keys: Tensor, *more: Tensor) -> Tensor:
        shapes.add((*queries.shape, keys.shape[2]))
        return queries

    monkeypatch.setattr(ProductAttend, "__call__", noted)
    contexts = range(16, 1_025, 16)
    steps = [[(1, context)] * count for context in contexts for count in (1, 2, 3, 7, 15)]
    for new in (2, 3, 5, 9, 17, 33, 64, 65, 200):
        steps += [[(new, context), (new, context), (1, 9)] for context in contexts[13::3]]
    for step in steps:
        layout = layout_of([(*lens, [0]) for lens in step], 1_024)
        backend.plan(layout)
        num_tokens = len(layout.kv_slot_mapping)
        q = torch.zeros(num_tokens, spec.num_heads, spec.head_dim, dtype=torch.bfloat16)
        kv = torch.zeros(num_tokens, spec.num_kv_heads, spec.head_dim, dtype=torch.bfloat16)
        backend.run(0, q, kv, kv)
    assert {(shape[1], shape[2]) for shape in shapes if shape[1] > 1} == {(2, 4), (4, 4), (8, 4)}
    assert {shape[2] for shape in shapes} == {4, 8, 16, 32, 64, 128}
    assert len({shape[-1] for shape in shapes}) == 12
    assert 6 * 9 < len(shapes) <= 6 * 12 + 3 * 12
