"""Is every backend right, and does a row keep its bits in any company?"""

from typing import Any, cast

import torch
from torch import Tensor

from bench.gpu.shapes import SHAPES, Figures, Scale, product_shapes
from executor_svc.torch_engine.attention.base import StepLayout
from executor_svc.torch_engine.attention.choice import choose_backend, make_attention
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.exactness import prepare
from executor_svc.torch_engine.graphs import bucket_sizes
from executor_svc.torch_engine.linear import make_linear, pad_rows

_SHAPES = ((64, 2, 16),)  # head_dim, group size, block size; float32 takes long to compile
_HALF_SHAPES = (*_SHAPES, (128, 4, 16), (128, 4, 256), (128, 8, 16), (96, 1, 64))


def attention(device: torch.device, scale: Scale) -> Figures:
    """Greatest errors by backend, and whether Triton's rows keep their bits."""
    from bench import kernels  # it sets Triton up for its interpreter where there is no GPU

    on_gpu = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if on_gpu else (torch.float32,)
    shapes = [
        kernels.Shape(head_dim, group_size, block_size, dtype)
        for dtype in dtypes
        for head_dim, group_size, block_size in (_HALF_SHAPES if dtype.itemsize == 2 else _SHAPES)
    ]
    errors: dict[str, float] = {}
    is_same = True
    for shape in shapes:
        case = kernels.Case(shape, device)
        key = f"triton {str(shape.dtype)[6:]}"
        errors[key] = max(errors.get(key, 0.0), kernels.max_error(case))
        is_same &= kernels.is_same_alone(case)
        prefills = kernels.Case(shape, device, kernels.PREFILLS)
        is_same &= kernels.is_same_replayed(prefills)
        print(f"{shape}: {errors[key]:.1e}, same bits so far: {is_same}", flush=True)
    return {"max_error": errors, "is_same": is_same} | _engines_agree(device, scale)


def _engines_agree(device: torch.device, scale: Scale) -> Figures:
    """What every backend that can work here gives for one step, beside ``reference``."""
    spec = SHAPES["tiny"] if device.type == "cpu" else SHAPES["qwen3-0.6b"]
    lens = ((1, 300), (260, 260), (1, 17), (40, 100))  # new tokens, context
    draw = torch.Generator().manual_seed(1)
    num_tokens = sum(new for new, _ in lens)
    q, k, v = (
        torch.randn(num_tokens, heads, spec.head_dim, generator=draw).to(spec.dtype).to(device)
        for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    )
    tables = [[2 * i, 2 * i + 1] for i in range(len(lens))]
    slots = [
        tables[i][p // 256] * 256 + p % 256
        for i, (new, context) in enumerate(lens)
        for p in range(context - new, context)
    ]
    # What lies before the new tokens is written first, as if by an earlier step.
    before = [
        tables[i][p // 256] * 256 + p % 256
        for i, (new, context) in enumerate(lens)
        for p in range(context - new)
    ]
    results: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for name in ("reference", "cpu", "triton", "torch", "flash"):
        config = EngineConfig(
            models=(("m", "m"),),
            device=str(device),
            block_size=256,
            exact_mode=False,
            max_num_batched_tokens=512,
            attention_backend=cast(Any, name),
        )
        try:
            choose_backend(config, device, {spec.dtype})
        except ValueError as problem:
            skipped[name] = str(problem)
            continue
        backend = make_attention(spec, config, num_blocks=2 * len(lens), device=device)
        kept = torch.randn(
            len(before), spec.num_kv_heads, spec.head_dim, generator=draw.manual_seed(2)
        ).to(k)
        # every backend of ours has a cache, the protocol does not say so
        backend._cache.write(0, torch.tensor(before, device=device), kept, kept)  # type: ignore[attr-defined]
        layout = StepLayout(
            [new for new, _ in lens],
            [context for _, context in lens],
            tables,
            torch.tensor(slots, device=device),
        )
        backend.plan(layout)
        results[name] = backend.run(0, q, k, v).float()
    wanted = results.pop("reference")
    return {
        "difference_to_reference": {
            name: float((got - wanted).abs().max()) for name, got in results.items()
        },
        "skipped_backends": skipped,
    }


def rows(device: torch.device, scale: Scale) -> Figures:
    """For each weight's shape, the numbers of rows that give a row other bits than a full step."""
    prepare(device)
    names = ("tiny",) if device.type == "cpu" else ("qwen3-0.6b", "qwen3-8b")
    found: Figures = {}
    for name in names:
        spec = SHAPES[name]
        for out, into in product_shapes(spec):
            linear = make_linear(torch.randn(out, into, device=device).to(spec.dtype))
            x = torch.randn(scale.max_rows, into, device=device).to(spec.dtype)
            full = linear(pad_rows(x, linear.row_multiple))
            sizes = sorted({*range(1, scale.max_rows + 1), *bucket_sizes(256)})
            different = [
                count
                for count in sizes
                if count <= scale.max_rows
                and not torch.equal(
                    linear(pad_rows(x[:count], linear.row_multiple))[:count], full[:count]
                )
            ]
            found[f"{out}x{into}"] = {
                "num_different": len(different),
                "different": different[:20],
                "graph_sizes": [size for size in bucket_sizes(256) if size in different],
            }
            print(f"{out} x {into}: {len(different)} numbers of rows differ", flush=True)
    return found
