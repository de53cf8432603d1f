"""Attention on the CPU, and the definition that it and all others have to equal."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from executor_svc.torch_engine.attention.base import AttentionBackend, StepLayout
from executor_svc.torch_engine.attention.choice import make_attention
from executor_svc.torch_engine.attention.cpu import CpuAttention
from executor_svc.torch_engine.attention.reference import attend
from executor_svc.torch_engine.config import AttentionName, EngineConfig, ModelSpec
from executor_svc.torch_engine.model_config import load_spec
from tests.engine.steps import layout_of

CPU = torch.device("cpu")


def both_backends(
    spec: ModelSpec, num_blocks: int, block_size: int
) -> tuple[AttentionBackend, AttentionBackend]:
    """The CPU's and the definition."""
    names: tuple[AttentionName, ...] = ("cpu", "reference")
    cpu, reference = (
        make_attention(
            spec,
            EngineConfig(models=(("m", "m"),), attention_backend=name, block_size=block_size),
            num_blocks=num_blocks,
            device=CPU,
        )
        for name in names
    )
    return cpu, reference


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
def test_the_definition_is_scaled_dot_product_attention(window: int | None) -> None:
    """The query at i sees i - window < j <= i."""
    q, k, v = torch.randn(5, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    i, j = torch.arange(4, 9)[:, None], torch.arange(9)
    mask = (j <= i) & (j > i - (window or 9))
    heads_first = [x.transpose(0, 1) for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        heads_first[0], heads_first[1], heads_first[2], attn_mask=mask, enable_gqa=True
    ).transpose(0, 1)
    assert torch.allclose(attend(q, k, v, window), wanted, atol=1e-6)


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 6, 7, 8, 130])
def test_the_cpu_backend_equals_the_definition(qwen3: Path, group_size: int) -> None:
    """Groups of 7, 6 and 3 are those of Qwen2.5 and of Llama 3.2; their tiles want filling up."""
    spec = load_spec(qwen3)
    spec = replace(spec, num_heads=group_size * spec.num_kv_heads)
    backends = both_backends(spec, num_blocks=16, block_size=32)
    tables = [[3], [7, 1, 9, 0, 15], [2, 4]]
    for chunks in (
        [(20, 20, tables[0]), (140, 140, tables[1]), (33, 33, tables[2])],
        [(1, 21, tables[0]), (4, 144, tables[1]), (1, 34, tables[2])],
    ):
        check_equal(backends, layout_of(chunks, 32), spec)


def check_equal(backends: Sequence[AttentionBackend], layout: StepLayout, spec: ModelSpec) -> None:
    """Two backends give the same for a step, in all their layers."""
    num_rows = len(layout.kv_slot_mapping) + 3  # with padding
    for backend in backends:
        backend.plan(layout)
    for layer_index in range(len(spec.windows)):
        q = torch.randn(num_rows, spec.num_heads, spec.head_dim)
        k, v = torch.randn(2, num_rows, spec.num_kv_heads, spec.head_dim)
        results = [backend.run(layer_index, q, k, v) for backend in backends]
        assert torch.allclose(results[0], results[1], atol=2e-6)
        assert not results[0][-3:].any()


@pytest.mark.parametrize("block_size", [16, 50])
@pytest.mark.parametrize("window", [1, 5, 16, 50, 64, 100, 511, 512, 513, 700, 5000])
def test_windows_of_the_cpu_backend_equal_the_definition(
    qwen3: Path, window: int, block_size: int
) -> None:
    """Beside a layer without one; around blocks of the cache, and of 512 keys."""
    spec = replace(load_spec(qwen3), num_layers=2, windows=(window, None))
    num_blocks = 3 * -(-1200 // block_size)
    backends = both_backends(spec, num_blocks, block_size)
    blocks = list(range(num_blocks))
    random.Random(1).shuffle(blocks)
    tables = [blocks[i::3] for i in range(3)]
    for lens in (
        [(600, 600), (90, 90), (1, 1)],
        [(500, 1100), (1, 91), (1, 2)],
        [(1, 1101), (1, 92), (30, 32)],
    ):
        chunks = [(*pair, table) for pair, table in zip(lens, tables, strict=True)]
        check_equal(backends, layout_of(chunks, block_size), spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [40, 530])
def test_a_window_on_the_cpu_does_not_feel_chunks(
    qwen3: Path, window: int, dtype: torch.dtype
) -> None:
    """Rows of one chunk see other blocks of 512 keys than each of them would alone."""
    spec = replace(load_spec(qwen3), num_layers=1, windows=(window,), dtype=dtype)
    num_tokens = 1300
    q = torch.randn(num_tokens, spec.num_heads, spec.head_dim).to(dtype)
    k, v = torch.randn(2, num_tokens, spec.num_kv_heads, spec.head_dim).to(dtype)
    backend, _ = both_backends(spec, 1, num_tokens)

    def in_chunks_of(size: int) -> Tensor:
        parts = []
        for start in range(0, num_tokens, size):
            end = min(start + size, num_tokens)
            backend.plan(layout_of([(end - start, end, [0])], num_tokens))
            parts.append(backend.run(0, q[start:end], k[start:end], v[start:end]))
        return torch.cat(parts)

    whole = in_chunks_of(num_tokens)
    for size in (1, 7, 333):
        assert torch.equal(in_chunks_of(size), whole)


def test_keys_before_the_window_are_not_gathered(qwen3: Path) -> None:
    spec = replace(load_spec(qwen3), num_layers=1, windows=(100,))
    backend, _ = both_backends(spec, 1, 1300)
    assert isinstance(backend, CpuAttention)
    backend.plan(layout_of([(1, 1300, [0])], 1300))
    (group,) = backend._plans[100].groups
    slots = [*range(1024, 1300), *[backend._cache.null_slot] * 108]
    for head, of_head in enumerate(group.slots.view(spec.num_kv_heads, -1)):
        first = head * backend._cache.keys.shape[2]
        assert of_head.tolist() == [first + slot for slot in slots]
    backend.plan(layout_of([(300, 1300, [0])], 1300))
    (group,) = backend._plans[100].groups
    assert [tile.keys.start for tile in group.tiles] == [0, 0, 512, 512, 512]
