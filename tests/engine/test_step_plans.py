"""How steps are laid out for backends and graphs, and how they come to the device."""

import numpy as np
import pytest
import torch

from executor_svc.torch_engine.attention.base import StepLimits
from executor_svc.torch_engine.attention.flash_plan import FlashPlan
from executor_svc.torch_engine.graphs import bucket_sizes
from executor_svc.torch_engine.host_step import HostStep
from executor_svc.torch_engine.staging import PinnedSet, Staging
from tests.engine.steps import layout_of

CPU = torch.device("cpu")


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
