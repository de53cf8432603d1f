"""The choice of an attention backend, its definition, and how steps are laid out for it."""

import importlib.util
import inspect
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from executor_svc.torch_engine.attention.base import AttentionBackend, StepLayout, StepLimits
from executor_svc.torch_engine.attention.choice import choose_backend, make_attention
from executor_svc.torch_engine.attention.cpu import CpuAttention
from executor_svc.torch_engine.attention.flash_plan import FlashPlan
from executor_svc.torch_engine.attention.reference import attend
from executor_svc.torch_engine.config import AttentionName, EngineConfig, ModelSpec
from executor_svc.torch_engine.graphs import bucket_sizes
from executor_svc.torch_engine.host_step import HostStep
from executor_svc.torch_engine.kv_cache import kv_slots
from executor_svc.torch_engine.model_config import load_spec
from executor_svc.torch_engine.staging import PinnedSet, Staging
from tests.engine.driving import build, lease, run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = {torch.bfloat16}


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(models=(("m", "m"),), **settings)


@pytest.fixture
def has_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is installed."""
    find_spec = importlib.util.find_spec

    def find(name: str) -> object:
        return object() if name == "flash_attn" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_without_a_gpu_it_is_the_cpu_backend() -> None:
    assert choose_backend(config(), CPU, HALF) == "cpu"
    assert choose_backend(config(exact_mode=False, block_size=256), CPU, HALF) == "cpu"


@pytest.mark.usefixtures("has_flash_attn")
def test_the_choice_on_a_gpu() -> None:
    fast: dict[str, Any] = {"exact_mode": False}
    assert choose_backend(config(), CUDA, HALF) == "triton"
    assert choose_backend(config(block_size=256), CUDA, HALF) == "triton"
    assert choose_backend(config(block_size=512, **fast), CUDA, HALF) == "flash"
    assert choose_backend(config(block_size=128, **fast), CUDA, HALF) == "triton"
    both = {torch.bfloat16, torch.float32}
    assert choose_backend(config(block_size=256, **fast), CUDA, both) == "triton"


def test_without_the_package_a_gpu_uses_triton() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed")
    assert choose_backend(config(block_size=256, exact_mode=False), CUDA, HALF) == "triton"


def test_without_triton_a_gpu_uses_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend(config(block_size=256), CUDA, HALF) == "cpu"


@pytest.mark.parametrize("name", ["flash", "torch", "triton", "cpu", "reference"])
@pytest.mark.usefixtures("has_flash_attn")
def test_a_backend_that_can_work_can_be_forced(name: Any) -> None:
    forced = config(attention_backend=name, block_size=256, exact_mode=False)
    assert choose_backend(forced, CUDA, HALF) == name


@pytest.mark.parametrize(
    ("name", "settings", "device", "problem"),
    [
        ("triton", {}, CPU, "needs a CUDA device; device is cpu"),
        ("flash", {}, CPU, "needs a CUDA device; device is cpu"),
        ("torch", {"exact_mode": True}, CUDA, "needs exact_mode to be false"),
        ("flash", {"exact_mode": True}, CUDA, "needs exact_mode to be false"),
        ("flash", {"block_size": 16}, CUDA, "needs block_size to be a multiple of 256; it is 16"),
        ("torch", {"block_size": 384}, CUDA, "needs block_size to be a multiple of 256; it is 384"),
        ("torch", {"dtype": torch.float32}, CUDA, "needs dtype float16 or bfloat16; .* float32"),
    ],
)
def test_a_backend_that_cannot_work_is_refused(
    name: str, settings: dict[str, Any], device: torch.device, problem: str
) -> None:
    settings = {"exact_mode": False, "block_size": 256} | settings
    dtype = settings.pop("dtype", torch.bfloat16)
    with pytest.raises(ValueError, match=f"^attention_backend: {name} .*{problem}"):
        choose_backend(config(attention_backend=name, **settings), device, {dtype})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "flash_attn" else find_spec(name),
    )
    forced = config(attention_backend="flash", block_size=256, exact_mode=False)
    with pytest.raises(ValueError, match="flash needs the flash-attn package"):
        choose_backend(forced, CUDA, HALF)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^attention_backend must be one of auto, flash"):
        config(attention_backend="fast")


def test_torch_takes_the_arguments_that_we_pass() -> None:
    names = set(inspect.signature(varlen_attn).parameters)
    assert names >= {"window_size", "enable_gqa", "seqused_k", "block_table"}


def both_backends(
    spec: ModelSpec, num_blocks: int, block_size: int
) -> tuple[AttentionBackend, AttentionBackend]:
    """The CPU's and the definition."""
    names: tuple[AttentionName, ...] = ("cpu", "reference")
    cpu, reference = (
        make_attention(
            spec,
            config(attention_backend=name, block_size=block_size),
            num_blocks=num_blocks,
            device=CPU,
        )
        for name in names
    )
    return cpu, reference


def layout_of(chunks: list[tuple[int, int, list[int]]], block_size: int) -> StepLayout:
    """Some (new tokens, context, block table)."""
    slots = [kv_slots(table, context - new, context, block_size) for new, context, table in chunks]
    return StepLayout(
        query_lens=[new for new, *_ in chunks],
        context_lens=[context for _, context, _ in chunks],
        block_tables=[table for *_, table in chunks],
        kv_slot_mapping=torch.from_numpy(np.concatenate(slots)),
    )


def test_the_definition_is_scaled_dot_product_attention() -> None:
    q, k, v = torch.randn(5, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    heads_first = [x.transpose(0, 1) for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        heads_first[0], heads_first[1], heads_first[2], attn_mask=mask, enable_gqa=True
    ).transpose(0, 1)
    assert torch.allclose(attend(q, k, v), wanted, atol=1e-6)


def test_the_definition_of_a_window() -> None:
    """The query at i sees i - window < j <= i."""
    q, k, v = torch.randn(5, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    i, j = torch.arange(4, 9)[:, None], torch.arange(9)
    for window in (1, 3, 9, 20):
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k, v)),
            attn_mask=(j > i - window) & (j <= i),
            enable_gqa=True,
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
    (group,) = backend._groups[100]
    assert group.slots.tolist() == [*range(1024, 1300), *[backend._cache.null_slot] * 108]
    backend.plan(layout_of([(300, 1300, [0])], 1300))
    (group,) = backend._groups[100]
    assert [tile.keys.start for tile in group.tiles] == [0, 0, 512, 512, 512]


def test_a_triton_plan_says_where_everything_is() -> None:
    pytest.importorskip("triton")
    from executor_svc.torch_engine.attention.triton_plan import make_plan
    from executor_svc.torch_engine.kernels import paged_attention as sections

    chunks = [(1, 300, list(range(5, 24))), (1, 1, [2]), (20, 40, [0, 1, 3])]
    layout = layout_of(chunks, 16)
    plan = make_plan(layout, queries_per_tile=8, max_items=2)
    assert plan.meta.dtype == np.int32

    def section(which: int, count: int) -> list[int]:
        return plan.meta[plan.meta[which] :][:count].tolist()

    assert section(sections.QUERY_STARTS, 3) == [0, 1, 2]
    assert section(sections.QUERY_LENS, 3) == [1, 1, 20]
    assert section(sections.CONTEXTS, 3) == [300, 1, 40]
    tables = section(sections.TABLES, 23)
    starts = section(sections.TABLE_STARTS, 3)
    for start, (*_, table) in zip(starts, chunks, strict=True):
        assert tables[start : start + len(table)] == table
    # two chunks of keys, one, none
    assert section(sections.ITEM_STARTS, 4) == [0, 2, 3, 3]
    assert section(sections.ITEMS, 3) == [0, 0, 1]
    # the first sequence fills the workspace
    assert plan.slices == (range(1), range(1, 3))
    assert section(sections.SLICES, 3) == [0, 2, 3]
    assert section(sections.TILES, 6) == [2, 0, 2, 8, 2, 16]
    assert plan.num_tiles == 3
    assert plan.has_decode
    assert not plan.is_pure_decode


def test_a_triton_plan_leaves_out_chunks_before_the_window() -> None:
    pytest.importorskip("triton")
    from executor_svc.torch_engine.attention.triton_plan import make_plan
    from executor_svc.torch_engine.kernels import paged_attention as sections

    lens = [(1, 1000), (1, 768), (1, 769), (1, 40), (9, 900)]
    layout = layout_of([(*pair, list(range(63))) for pair in lens], 16)
    plan = make_plan(layout, queries_per_tile=8, max_items=8, window=256)
    starts = plan.meta[plan.meta[sections.ITEM_STARTS] :][:6]
    # from keys 744, 512, 513 and 0 on
    assert starts.tolist() == [0, 2, 3, 5, 6, 6]


def test_the_largest_triton_plan_fits_its_buffer() -> None:
    pytest.importorskip("triton")
    from executor_svc.torch_engine.attention.triton_plan import make_plan, max_meta_len

    limits = StepLimits(max_num_seqs=6, max_num_tokens=100, max_context_tokens=1000)
    most = max_meta_len(limits, block_size=16, queries_per_tile=8)
    table = list(range(63))
    for chunks in ([(1, 1000, table)] * 6, [(20, 1000, table)] * 5, [(2, 1000, table)] * 6):
        plan = make_plan(layout_of(chunks, 16), queries_per_tile=8, max_items=100)
        assert len(plan.meta) <= most


def test_a_flash_plan_keeps_its_buffers_and_fills_them_anew() -> None:
    limits = StepLimits(max_num_seqs=4, max_num_tokens=64, max_context_tokens=1024)
    plan = FlashPlan(limits, block_size=256, device=CPU)
    plan.fill(layout_of([(1, 600, [4, 5, 6]), (9, 9, [2])], 256))
    tables = plan.tables
    assert not plan.is_pure_decode
    plan.fill(layout_of([(1, 257, [9, 8]), (1, 1, [7])], 256))
    assert plan.is_pure_decode
    assert plan.query_starts.tolist() == [0, 1, 2]
    assert plan.key_starts.tolist() == [0, 257, 258]
    assert plan.contexts.tolist() == [257, 1]
    assert plan.tables.tolist() == [[9, 8, 0, 0], [7, 0, 0, 0]]
    assert plan.slots.tolist() == [8 * 256, 7 * 256]
    assert plan.tables.data_ptr() == tables.data_ptr()


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [(1, (1,)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (40, (1, 2, 4, 8, 16, 32, 40))],
)
def test_buckets_end_at_the_most_that_runs(max_num_seqs: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(max_num_seqs) == sizes


def test_there_is_no_bucket_past_256() -> None:
    assert bucket_sizes(256) == bucket_sizes(1000) == (1, 2, 4, 8, *range(16, 257, 16))


def test_a_step_is_filled_up_with_dummies() -> None:
    step = HostStep(
        np.array([7, 8]), np.array([3, 0]), np.array([19, 2]), [1, 1], [4, 1], [[1], [0]]
    )
    full = step.with_dummies(4)
    assert full.is_decode
    assert full.token_ids.tolist() == [7, 8, 0, 0]
    assert full.positions.tolist() == [3, 0, 0, 0]
    assert full.slots.tolist() == [19, 2, -1, -1]
    assert full.query_lens == [1, 1, 1, 1]
    assert full.context_lens == [4, 1, 0, 0]
    assert full.block_tables == [[1], [0], [], []]
    assert not HostStep(
        np.arange(3), np.arange(3), np.arange(3), [1, 2], [1, 2], [[0], [1]]
    ).is_decode


def test_staging_on_the_cpu_copies_into_what_stays() -> None:
    staging = Staging(CPU)
    buffer = torch.zeros(4, dtype=torch.int32)
    with staging.step():
        out = staging.copy(np.array([1, 2], dtype=np.int32), out=buffer)
        new = staging.copy(np.array([3.0, 4.0]))
    assert buffer.tolist() == [1, 2, 0, 0]
    assert out.data_ptr() == buffer.data_ptr()
    assert new.tolist() == [3.0, 4.0]


def test_a_pinned_set_hands_out_aligned_parts_and_grows_without_moving_them() -> None:
    pinned = PinnedSet(lambda num_bytes: torch.zeros(num_bytes, dtype=torch.uint8))
    arrays = [torch.arange(n, dtype=dtype) for n, dtype in ((3, torch.int32), (0, torch.int64))]
    arrays += [torch.arange(5.0), torch.arange(40_000), torch.arange(7, dtype=torch.int64)]
    copies = [pinned.hold(array) for array in arrays]
    assert all(torch.equal(*pair) for pair in zip(copies, arrays, strict=True))
    assert all(copy.storage_offset() * copy.element_size() % 16 == 0 for copy in copies)
    pinned.reuse()
    again = pinned.hold(torch.tensor([9]))
    assert again.untyped_storage().data_ptr() == copies[-1].untyped_storage().data_ptr()
    assert torch.equal(copies[0], arrays[0])  # of the buffer before


def test_an_engine_runs_on_the_definition(qwen3: Path) -> None:
    leases = [lease(key, list(range(3, 20 + 30 * key))) for key in range(3)]
    usual = run(build(qwen3), *leases)
    defined = run(build(qwen3, attention_backend="reference", exact_mode=False), *leases)
    assert defined.tokens == usual.tokens
    assert all(
        defined.logprobs[key] == pytest.approx(usual.logprobs[key], abs=1e-5) for key in range(3)
    )


def test_the_engine_needs_neither_triton_nor_flash_attn() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["flash_attn"] = sys.modules["llguidance"] = None
import executor_svc.torch_engine.engine
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
