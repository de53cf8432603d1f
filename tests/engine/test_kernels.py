"""Our Triton kernels: right in Triton's interpreter, and compiled for a Hopper GPU.

Neither needs a GPU. The interpreter runs in a process of its own, see kernel_cases/.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402 - Triton may be missing
from triton.compiler import ASTSource  # noqa: E402

from executor_svc.torch_engine.attention.triton_paged import (  # noqa: E402
    decode_rows,
    kernel_shape,
)
from executor_svc.torch_engine.kernels import (  # noqa: E402
    elementwise,
    kv_store,
    paged_attention,
    rotate_store,
)

HOPPER = GPUTarget("cuda", 90, 32)
CASES = [
    path
    for path in sorted(Path(__file__).with_name("kernel_cases").glob("*.py"))
    if path.stem not in ("__init__", "interpreter")
]
TIMEOUT_S = 600
POINTERS = {
    "meta": "*i32",
    "slots": "*i64",
    "greatest_out": "*fp32",
    "greatest_in": "*fp32",
    "total_out": "*fp32",
    "total_in": "*fp32",
    "mixed_out": "*fp32",
    "mixed_in": "*fp32",
    "cos": "*fp32",
    "sin": "*fp32",
}
DATA = (
    *("q", "k", "v", "x", "keys", "values", "out", "y", "total", "weight", "gate_up"),
    *("heads", "q_out", "q_weight", "k_weight"),
)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@pytest.mark.parametrize("cases", CASES, ids=[path.stem for path in CASES])
def test_kernels_in_the_interpreter(cases: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def compile_for_hopper(kernel: Any, dtype: torch.dtype, **constants: Any) -> Any:
    """What Triton makes of a kernel for tensors of a type, with the launches' usual alignment."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in DATA:
            signature[name] = "*" + TYPES[dtype]
        else:
            signature[name] = POINTERS.get(name, "fp32" if name in ("scale", "eps") else "i32")
    is_aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(kernel, signature, constants, is_aligned)
    options = {"num_warps": paged_attention.NUM_WARPS, "num_stages": 2}
    return triton.compile(source, target=HOPPER, options=options)


def compile_attention(
    head_dim: int, group_size: int, dtype: torch.dtype, block_size: int = 16, window: int = 0
) -> tuple[Any, Any]:
    """Decode and prefill."""
    shape = kernel_shape(group_size, head_dim, block_size, dtype) | {"WINDOW": window}
    rows = decode_rows(group_size)
    return (
        compile_for_hopper(paged_attention.decode_kernel, dtype, **shape, ROWS=rows),
        compile_for_hopper(
            paged_attention.prefill_kernel,
            dtype,
            **shape,
            ROWS=max(rows, paged_attention.PREFILL_ROWS),
        ),
    )


def tensor_core_layouts(compiled: Any) -> set[str]:
    return set(re.findall(r"#ttg\.nvidia_mma<\{(.*?)\}>", compiled.asm["ttgir"]))


@pytest.mark.parametrize(
    ("head_dim", "group_size", "dtype", "window"),
    [
        (128, 4, torch.bfloat16, 0),
        (128, 4, torch.bfloat16, 4096),
        (64, 8, torch.float16, 0),
        (64, 7, torch.bfloat16, 1000),
        (96, 1, torch.bfloat16, 0),
        (80, 7, torch.bfloat16, 0),
        (256, 2, torch.bfloat16, 0),
    ],
)
def test_prefill_and_decode_use_the_same_instructions(
    head_dim: int, group_size: int, dtype: torch.dtype, window: int
) -> None:
    """The order of every sum depends on the instruction and on which warp has which keys."""
    decode, prefill = compile_attention(head_dim, group_size, dtype, window=window)
    assert len(tensor_core_layouts(decode)) == 1
    assert tensor_core_layouts(decode) == tensor_core_layouts(prefill)
    for compiled in (decode, prefill):
        assert "mma.sync" in compiled.asm["ptx"]
        assert "wgmma" not in compiled.asm["ptx"]
        assert compiled.metadata.shared < 227 << 10  # what a block of threads can have


def test_float32_attention_compiles() -> None:
    for compiled in compile_attention(64, 2, torch.float32, block_size=256):
        assert compiled.asm["cubin"]


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("half", [32, 40, 48, 64, 128])
def test_rotating_and_storing_at_once_compiles(half: int, *, has_norm: bool) -> None:
    padded = triton.next_power_of_2(half)
    constants = {"HAS_NORM": has_norm, "HALF": half, "PADDED": padded, "HEADS": 4}
    compiled = compile_for_hopper(rotate_store._rotate_store_kernel, torch.bfloat16, **constants)
    assert compiled.asm["cubin"]


def test_the_other_kernels_compile() -> None:
    merge = compile_for_hopper(
        paged_attention.merge_kernel, torch.bfloat16, GROUP=4, HEAD_DIM=128, DIM=128, ROWS=16
    )
    store = compile_for_hopper(kv_store._store_kernel, torch.bfloat16, WIDTH=1024, PADDED=1024)
    norms = [
        compile_for_hopper(elementwise._rms_norm_kernel, torch.bfloat16, IS_SUM=has, PADDED=4096)
        for has in (False, True)
    ]
    silu = compile_for_hopper(elementwise._silu_mul_kernel, torch.bfloat16, BLOCK=1024)
    rotate = compile_for_hopper(
        elementwise._rotate_kernel, torch.bfloat16, HALF=64, PADDED=64, HEADS=4
    )
    for compiled in (merge, store, *norms, silu, rotate):
        assert compiled.asm["cubin"]
