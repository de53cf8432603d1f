"""Our Triton attention against its definition: the largest error of each shape, as a table.

Without a GPU the kernels run in Triton's interpreter, which computes what a GPU would, but for the
order of sums inside one matrix product: so this says whether they are right, and nothing about
speed. Each case is a step with ragged lengths (one token, whole prompts, chunks with a prefix,
decode, a dummy) on blocks in random order, looked at in three ways:

- error: the greatest difference to ``reference``, which gets the same numbers in float32;
- alone: each sequence by itself gives the bits that it has in company;
- replay: each row of a prefill, computed again as a decode step, gives the same bits.

Ends with one line of JSON.
"""

import itertools
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from bench.arguments import parser_of
from executor_svc.torch_engine.attention.base import AttentionBackend, StepLayout, StepLimits
from executor_svc.torch_engine.attention.reference import ReferenceAttention
from executor_svc.torch_engine.attention.triton_paged import TritonAttention
from executor_svc.torch_engine.kv_cache import PagedKVCache, kv_slots

HEAD_DIMS = (64, 96, 128)
GROUP_SIZES = (1, 2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 256)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_HELP = "some of float32, float16, bfloat16; the interpreter does not round bfloat16 right"
NUM_KV_HEADS = 2
NUM_PADDING_ROWS = 3
LIMITS = StepLimits(max_num_seqs=16, max_num_tokens=512, max_context_tokens=1024)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence: the last ``num_new`` of ``context``; no context is a dummy."""

    sequence: int
    num_new: int
    context: int


LENGTHS = ((1, 1), (1, 256), (1, 300), (1, 0), (2, 257), (5, 5), (40, 40), (33, 290))
STEP = tuple(Chunk(i, *lengths) for i, lengths in enumerate(LENGTHS))
# Prefills that cross the end of a chunk of keys, and of a tile of queries.
PREFILLS = (Chunk(0, 3, 258), Chunk(1, 9, 9), Chunk(2, 5, 290))


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's attention."""

    head_dim: int
    group_size: int
    block_size: int
    dtype: torch.dtype
    window: int | None = None


class Case:
    """Sequences with all their keys, values and queries, in rows of their own."""

    def __init__(self, shape: Shape, device: torch.device, chunks: Sequence[Chunk] = STEP) -> None:
        self.shape, self.device, self.chunks = shape, device, chunks
        draw = torch.Generator().manual_seed(1)
        num_heads = (NUM_KV_HEADS * shape.group_size, NUM_KV_HEADS, NUM_KV_HEADS)
        self.rows = [  # of each sequence: q, k and v of all its tokens, each [tokens, heads, dim]
            [
                torch.randn(max(chunk.context, 1), n, shape.head_dim, generator=draw)
                .to(shape.dtype)
                .to(device)
                for n in num_heads
            ]
            for chunk in chunks
        ]
        num_blocks = [-(-chunk.context // shape.block_size) for chunk in chunks]
        blocks = list(range(sum(num_blocks) + 2))
        random.Random(1).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(count)] for count in num_blocks]
        self.num_blocks = sum(num_blocks) + 2

    def cache(self, dtype: torch.dtype) -> PagedKVCache:
        """A cache that holds every sequence; elsewhere it has NaN, which nothing may read."""
        cache = PagedKVCache(
            num_layers=1,
            num_blocks=self.num_blocks,
            block_size=self.shape.block_size,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=self.shape.head_dim,
            dtype=dtype,
            device=self.device,
        )
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        for chunk, (_, k, v) in zip(self.chunks, self.rows, strict=True):
            if chunk.context:
                slots = kv_slots(
                    self.tables[chunk.sequence], 0, chunk.context, self.shape.block_size
                )
                cache.write(0, torch.from_numpy(slots).to(self.device), k.to(dtype), v.to(dtype))
        return cache

    def triton(self, **options: Any) -> TritonAttention:
        num_heads = NUM_KV_HEADS * self.shape.group_size
        return TritonAttention(
            self.cache(self.shape.dtype),
            num_heads=num_heads,
            windows=(self.shape.window,),
            limits=LIMITS,
            **options,
        )

    def run(self, backend: AttentionBackend, chunks: Sequence[Chunk], dtype: torch.dtype) -> Tensor:
        """Some chunks as one step with padding, [rows, heads * head_dim]."""
        slots, parts = [], []
        for chunk in chunks:
            start = max(chunk.context - chunk.num_new, 0)
            table = self.tables[chunk.sequence]
            slots.append(
                torch.from_numpy(kv_slots(table, start, chunk.context, self.shape.block_size))
                if chunk.context
                else torch.tensor([-1])
            )
            rows = self.rows[chunk.sequence]
            parts.append([x[start : start + chunk.num_new].to(dtype) for x in rows])
        q, k, v = (
            torch.cat([*xs, torch.ones_like(xs[0][:1]).expand(NUM_PADDING_ROWS, -1, -1)])
            for xs in zip(*parts, strict=True)
        )
        backend.plan(
            StepLayout(
                query_lens=[chunk.num_new for chunk in chunks],
                context_lens=[chunk.context for chunk in chunks],
                block_tables=[self.tables[chunk.sequence] for chunk in chunks],
                kv_slot_mapping=torch.cat(slots).to(self.device),
            )
        )
        return backend.run(0, q, k, v)


def max_error(case: Case) -> float:
    """The greatest difference to the reference, padding and dummies included."""
    got = case.run(case.triton(), case.chunks, case.shape.dtype).float()
    # The reference does without dummies: it stores with an operator that knows no negative slot.
    real = [chunk for chunk in case.chunks if chunk.context]
    reference = ReferenceAttention(case.cache(torch.float32), windows=(case.shape.window,))
    wanted = case.run(reference, real, torch.float32)
    is_dummy = [chunk.context == 0 for chunk in case.chunks for _ in range(chunk.num_new)]
    is_dummy_row = torch.tensor([*is_dummy, *[False] * NUM_PADDING_ROWS], device=case.device)
    differences = got.clone()
    differences[~is_dummy_row] -= wanted
    return float(differences.abs().max())


def is_same_alone(case: Case) -> bool:
    """Company, its order and the size of the workspace have no influence on a sequence's bits."""
    together = case.run(case.triton(), case.chunks, case.shape.dtype)
    ends = list(itertools.accumulate(chunk.num_new for chunk in case.chunks))
    alone = case.triton(max_items=4)  # the least that the longest sequence needs
    for chunk, end in zip(case.chunks, ends, strict=True):
        got = case.run(alone, [chunk], case.shape.dtype)
        if not torch.equal(got[: chunk.num_new], together[end - chunk.num_new : end]):
            return False
    backwards = case.run(alone, case.chunks[::-1], case.shape.dtype)
    parts = torch.split(backwards[: ends[-1]], [chunk.num_new for chunk in case.chunks[::-1]])
    return torch.equal(torch.cat(parts[::-1]), together[: ends[-1]])


def is_same_replayed(case: Case) -> bool:
    """Each row of a prefill has the bits that a decode step gives it."""
    backend = case.triton()
    for chunk in case.chunks:
        if chunk.num_new > 1:
            prefill = case.run(backend, [chunk], case.shape.dtype)[: chunk.num_new]
            before = chunk.context - chunk.num_new
            decode = [
                case.run(backend, [Chunk(chunk.sequence, 1, before + i + 1)], case.shape.dtype)[:1]
                for i in range(chunk.num_new)
            ]
            if not torch.equal(torch.cat(decode), prefill):
                return False
    return True


def main() -> None:
    parser = parser_of("bench.kernels", __doc__)
    parser.add_argument("--dtypes", default="float32,float16", help=_DTYPE_HELP)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the first shape of each dtype")
    arguments = parser.parse_args()
    device, dtypes = torch.device(arguments.device), arguments.dtypes.split(",")
    num_shapes = 1 if arguments.quick else None
    head_dims, group_sizes = HEAD_DIMS[:num_shapes], GROUP_SIZES[:num_shapes]
    block_sizes = BLOCK_SIZES[:num_shapes]
    listed = ", ".join(map(str, block_sizes))
    print(f"| dtype | head dim | group | error at block {listed} | alone | replay |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for dtype, head_dim, group_size in itertools.product(dtypes, head_dims, group_sizes):
        cases = [
            Case(Shape(head_dim, group_size, block_size, DTYPES[dtype]), device)
            for block_size in block_sizes
        ]
        errors = [max_error(case) for case in cases]
        # The block size only says where a key lies, so one of them is enough for these two.
        same = [
            is_same_alone(cases[0]),
            is_same_replayed(Case(cases[0].shape, device, PREFILLS)),
        ]
        rows.append((dtype, head_dim, group_size, max(errors), *same))
        listed = ", ".join(f"{error:.1e}" for error in errors)
        answers = " | ".join("same" if answer else "differs" for answer in same)
        print(f"| {dtype} | {head_dim} | {group_size} | {listed} | {answers} |", flush=True)
    result = {
        "bench": "kernels",
        "device": arguments.device,
        "num_cases": len(rows) * len(block_sizes),
        "max_error": {name: max(row[3] for row in rows if row[0] == name) for name in dtypes},
        "is_same_alone": all(row[4] for row in rows),
        "is_same_replayed": all(row[5] for row in rows),
    }
    print(json.dumps(result))
    if not (result["is_same_alone"] and result["is_same_replayed"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
