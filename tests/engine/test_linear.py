"""Products with weights: what they give, and that a row does not feel its company."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.core.engine import PromptScoring, SamplingParams
from executor_svc.torch_engine import linear
from executor_svc.torch_engine.linear import (
    Int8Linear,
    Linear,
    PackedLinear,
    PlainLinear,
    make_linear,
    pad_rows,
)
from tests.engine.driving import build, lease, run

KINDS = [PlainLinear, PackedLinear, Int8Linear]
INPUTS, OUTPUTS = 2048, 96


def _weight(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return (torch.randn(OUTPUTS, INPUTS) / 40).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_product(kind: Any, dtype: torch.dtype) -> None:
    weight, bias, x = _weight(dtype), torch.randn(OUTPUTS).to(dtype), torch.randn(8, INPUTS)
    x = x.to(dtype)
    expected = x.float() @ weight.float().T + bias.float()
    result = kind(weight, bias)(x)
    assert result.dtype is dtype
    error = (result.float() - expected).norm() / expected.norm()
    assert error < (0.02 if kind is Int8Linear else 0.005 if dtype is torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(kind: Any, has_bias: bool, dtype: torch.dtype) -> None:
    bias = torch.randn(OUTPUTS).to(dtype) if has_bias else None
    product = kind(_weight(dtype), bias)
    row = torch.randn(1, INPUTS).to(dtype)
    alone = product(pad_rows(row, kind.row_multiple))[0]
    for count in (1, 2, 3, 7, 8, 15, 31, 64, 129):
        company = 5 * torch.randn(count, INPUTS).to(dtype)
        first = product(pad_rows(torch.cat([row, company]), kind.row_multiple))
        last = product(pad_rows(torch.cat([company, row]), kind.row_multiple))
        assert torch.equal(first[0], alone)
        assert torch.equal(last[count], alone)


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_numbers_of_rows_are_few_and_near(multiple: int) -> None:
    padded = {n: len(pad_rows(torch.ones(n, 1), multiple)) for n in range(1, 4097)}
    assert len(set(padded.values())) <= 8 * 9 + 16
    for n, count in padded.items():
        assert count % multiple == 0
        assert n <= count < max(n + multiple, n * 9 / 8)
    x = pad_rows(torch.ones(33, 2), multiple)
    assert x.sum() == 66
    assert x[33:].count_nonzero() == 0


def test_an_engine_makes_products_of_few_sizes(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of all lengths, each beside those that came before."""
    sizes: dict[Linear, set[int]] = {}
    for kind in (PackedLinear, PlainLinear):

        def call(product: Linear, x: Tensor, plain: Any = kind.__call__) -> Tensor:
            sizes.setdefault(product, set()).add(len(x))
            result: Tensor = plain(product, x)
            return result

        monkeypatch.setattr(kind, "__call__", call)
    engine = build(qwen3, max_num_seqs=32, max_num_batched_tokens=100, exact_mode=False)
    for n in range(1, 90):
        engine.add(lease(n, [n] * n, SamplingParams(max_tokens=1 + n % 7)))
        engine.step()
    run(engine)
    assert sizes
    seen = set.union(*sizes.values())
    assert 20 < len(seen) <= 16 / 2 + 8 + 8 + 5, "2, 4 .. 32, 36 .. 64, 72 .. 104"


def test_int8_of_rows_and_outputs_that_are_zero() -> None:
    weight = _weight()
    weight[3] = 0
    x = torch.randn(2, INPUTS)
    x[1] = 0
    result = Int8Linear(weight)(x)
    assert result.isfinite().all()
    assert result[1].count_nonzero() == 0
    assert result[0, 3] == 0


def test_int8_of_the_greatest_numbers_is_exact() -> None:
    """127 * 127 in each place: sums of 16 bits would be cut off."""
    weight, x = torch.ones(4, INPUTS), -torch.ones(1, INPUTS)
    assert torch.equal(Int8Linear(weight)(x), torch.full((1, 4), -float(INPUTS)))


def test_int8_keeps_what_is_not_finite() -> None:
    """So that the engine sees it and ends that sequence."""
    x = torch.randn(2, INPUTS)
    x[0, 0] = torch.nan
    result = Int8Linear(_weight())(x)
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


def test_a_cpu_without_exact_products_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_has_exact_int8", lambda: False)
    with pytest.raises(ValueError, match="quantization: this CPU"):
        make_linear(_weight(), quantization="int8")


@pytest.mark.parametrize("name", ["qwen3", "llama-tied", "qwen2", "qwen3-moe"])
def test_an_engine_of_int8_is_near_and_exact_in_itself(
    checkpoints: dict[str, Path], name: str
) -> None:
    folder, prompt = checkpoints[name], [(7 * i) % 300 + 3 for i in range(50)]
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    differences = (_prompt_logprobs(folder) - _prompt_logprobs(folder, quantization="int8")).abs()
    assert 0 < differences.mean() < 0.1 * _prompt_logprobs(folder).std()
    narrow = run(build(folder, quantization="int8"), lease(0, prompt, params))
    tokens = narrow.tokens[0]
    busy = build(folder, quantization="int8", max_num_seqs=8, max_num_batched_tokens=17)
    company = [lease(10 + i, prompt[i : 7 * i], params) for i in range(1, 6)]
    rest = run(busy, *company, lease(0, prompt, params, generated=(tokens[:5],)))
    assert (rest.tokens[0], rest.logprobs[0]) == (tokens[5:], narrow.logprobs[0][5:])


def _prompt_logprobs(folder: Path, **settings: Any) -> Tensor:
    engine = build(folder, **settings)
    scoring = PromptScoring(wants_logprobs=True)
    prompt = [(13 * i) % 300 + 3 for i in range(200)]
    record = run(engine, lease(0, prompt, SamplingParams(max_tokens=1), scoring=scoring))
    return torch.tensor(record.scores[0].logprob[1:])


def test_int8_is_for_the_cpu() -> None:
    with pytest.raises(ValueError, match="quantization"):
        build(Path("nowhere"), quantization="int8", device="cuda")
    with pytest.raises(ValueError, match="quantization must be one of none, int8"):
        build(Path("nowhere"), quantization="int4")
