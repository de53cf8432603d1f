"""What the families do not share: experts, biases. test_reference.py compares all of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from executor_svc.core.engine import SamplingParams
from executor_svc.torch_engine.config import ExpertsSpec
from executor_svc.torch_engine.models.experts import ExpertLoop, Experts, GroupedExperts
from executor_svc.torch_engine.models.tensors import Weights
from tests.engine.driving import build, lease, run

PARAMS = SamplingParams(max_tokens=16, seed=7, ignore_eos=True)
PROMPT = [(11 * i) % 300 + 3 for i in range(60)]
# Large enough for the products whose bits depend on the number of rows, if one lets them.
HIDDEN, INNER, NUM_EXPERTS = 2048, 512, 6


def _weights(dtype: torch.dtype) -> Weights:
    torch.manual_seed(3)
    tensors = {"gate.weight": torch.randn(NUM_EXPERTS, HIDDEN)}
    for i in range(NUM_EXPERTS):
        tensors |= {
            f"experts.{i}.gate_proj.weight": torch.randn(INNER, HIDDEN) / 40,
            f"experts.{i}.up_proj.weight": torch.randn(INNER, HIDDEN) / 40,
            f"experts.{i}.down_proj.weight": torch.randn(HIDDEN, INNER) / 20,
        }
    return Weights(lambda name: tensors[name].to(dtype))


def _experts(dtype: torch.dtype) -> Experts:
    spec = ExpertsSpec(NUM_EXPERTS, 2, INNER, True, frozenset({0}))
    return Experts(spec, _weights(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_feel_which_experts_its_company_hits(dtype: torch.dtype) -> None:
    experts = _experts(dtype)
    x = torch.randn(65, HIDDEN).to(dtype)
    together = experts(x, 65)
    for i in range(0, 65, 8):
        pair = experts(x[[i, (i + 1) % 65]], 2)
        assert torch.equal(pair[0], together[i])


def test_padding_hits_no_expert() -> None:
    experts = _experts(torch.float32)
    x = torch.randn(5, HIDDEN)
    padded = torch.cat([x, torch.randn(3, HIDDEN)])
    assert torch.equal(experts(padded, 5)[:5], experts(x, 5))
    assert experts(padded, 5)[5:].count_nonzero() == 0


@pytest.mark.parametrize(
    "expert_of", [[0, 0, 1, 3, 3, 3, 5], [2, 2, 2], [5]], ids=["some", "one", "one row"]
)
def test_the_grouped_product_equals_the_loop(expert_of: list[int]) -> None:
    """The former is for CUDA; torch computes it on the CPU too."""
    parts = [_weights(torch.float32).under(f"experts.{i}") for i in range(NUM_EXPERTS)]
    rows, numbers = torch.randn(len(expert_of), HIDDEN), torch.tensor(expert_of)
    loop, grouped = ExpertLoop(parts)(rows, numbers), GroupedExperts(parts)(rows, numbers)
    assert torch.allclose(loop, grouped, atol=1e-4)
    assert loop.abs().mean() > 0.1


def test_shares_are_those_of_the_likeliest_experts() -> None:
    weights, experts = _weights(torch.float32), _experts(torch.float32)
    x = torch.randn(2, HIDDEN)
    likelihoods = (x @ weights.tensor("gate.weight").T).softmax(-1)

    def one(row: Tensor, i: int) -> Tensor:
        part = weights.under(f"experts.{i}")
        gate, up, down = (part.tensor(f"{name}_proj.weight") for name in ("gate", "up", "down"))
        return down @ (torch.nn.functional.silu(gate @ row) * (up @ row))

    for row, result, likelihood in zip(x, experts(x, 2), likelihoods, strict=True):
        best = likelihood.argsort(descending=True)[:2].tolist()
        total = sum(likelihood[i] for i in best)
        expected = sum((likelihood[i] / total * one(row, i) for i in best), torch.zeros(HIDDEN))
        assert torch.allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "mistral", "qwen3-moe", "qwen3-moe-mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_company_nor_chunks_nor_a_resumption_matter(
    checkpoints: dict[str, Path], name: str, dtype: str
) -> None:
    folder = checkpoints[name]
    alone = run(build(folder, dtype=dtype), lease(0, PROMPT, PARAMS))
    tokens, logprobs = alone.tokens[0], alone.logprobs[0]
    assert len(tokens) == PARAMS.max_tokens
    company = [
        lease(10 + i, PROMPT[i : 9 * i], replace(PARAMS, seed=i, max_tokens=3 * i))
        for i in range(1, 7)
    ]
    busy = build(folder, dtype=dtype, max_num_seqs=8, max_num_batched_tokens=23)
    record = run(busy, *company, lease(0, PROMPT, PARAMS))
    assert (record.tokens[0], record.logprobs[0]) == (tokens, logprobs)
    rest = run(
        build(folder, dtype=dtype),
        *(lease(held, PROMPT, PARAMS, generated=(tokens[:held],)) for held in range(1, 16, 2)),
    )
    for held in range(1, 16, 2):
        assert (rest.tokens[held], rest.logprobs[held]) == (tokens[held:], logprobs[held:])
