"""Norms, rotations and what is stored: equal to the layers' definitions."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from executor_svc.torch_engine.kernels.elementwise import add_rms_norm, rms_norm, rotate, silu_mul
from executor_svc.torch_engine.kernels.rotate_store import rotate_and_store
from executor_svc.torch_engine.layers import RMSNorm, Rotary
from tests.engine.kernel_cases.interpreter import CPU


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_elementwise_kernels_equal_the_layers(dtype: torch.dtype, tolerance: float) -> None:
    draw = torch.Generator(CPU).manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    def is_close(a: Tensor, b: Tensor) -> bool:
        return a.dtype == b.dtype and torch.allclose(a, b, atol=tolerance, rtol=tolerance)

    weight, x = numbers(96), numbers(5, 96)
    norm = RMSNorm(weight, 1e-6)
    assert is_close(rms_norm(x, weight, 1e-6), norm(x))
    heads = numbers(5, 6, 96)[:, :4]  # queries as a decoder cuts them out: rows with gaps
    assert is_close(rms_norm(heads, weight, 1e-6), norm(heads))
    y = numbers(5, 96)
    normed, total = add_rms_norm(x, y, weight, 1e-6)
    assert torch.equal(total, x + y)
    assert is_close(normed, norm(x + y))
    gate_up = numbers(5, 2 * 1500)
    gate, up = gate_up.chunk(2, dim=-1)
    assert is_close(silu_mul(gate_up), F.silu(gate) * up)
    cos, sin = torch.rand(2, 5, 1, 48, generator=draw)
    assert is_close(rotate(heads, cos, sin), Rotary.apply(heads, cos, sin))


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_rotating_and_storing_at_once_equals_the_layers(
    head_dim: int, dtype: torch.dtype, *, has_norms: bool
) -> None:
    draw = torch.Generator(CPU).manual_seed(head_dim)
    num_q, num_kv = 6, 2
    heads = torch.randn(4, num_q + 2 * num_kv, head_dim, generator=draw).to(dtype)
    angles = torch.rand(2, 4, 1, head_dim // 2, generator=draw).unbind(0)
    q_norm, k_norm = (
        RMSNorm(weight, 1e-6) for weight in torch.randn(2, head_dim, generator=draw).to(dtype)
    )
    norms = (q_norm.weight, k_norm.weight, 1e-6) if has_norms else None
    slots = torch.tensor([7, -1, 3])  # the last row is padding

    def run_rows(first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = torch.full((2, 3, 4, num_kv, head_dim), 9.0).to(dtype).unbind(0)
        cos, sin = (part[first:end] for part in angles)
        target = slots[first:end], keys, values
        q = rotate_and_store(heads[first:end], num_q, (cos, sin), norms, *target)
        return q, keys.flatten(0, 1), values.flatten(0, 1)

    q, keys, values = run_rows(0, 4)
    wanted_q, wanted_k, wanted_v = heads.split([num_q, num_kv, num_kv], dim=1)
    if has_norms:
        wanted_q, wanted_k = q_norm(wanted_q), k_norm(wanted_k)
    wanted_q, wanted_k = (Rotary.apply(x, *angles) for x in (wanted_q, wanted_k))
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    assert torch.allclose(q, wanted_q, atol=tolerance, rtol=tolerance)
    assert torch.allclose(keys[[7, 3]], wanted_k[[0, 2]], atol=tolerance, rtol=tolerance)
    assert torch.equal(values[[7, 3]], wanted_v[[0, 2]])
    others = [slot for slot in range(12) if slot not in (7, 3)]
    assert (keys[others] == 9).all()
    assert (values[others] == 9).all()
    alone = run_rows(2, 3)
    assert torch.equal(alone[0], q[2:3])
    assert torch.equal(alone[1][3], keys[3])
