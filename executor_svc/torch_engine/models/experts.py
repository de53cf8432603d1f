"""A mixture of experts: feed-forwards of which each token uses a few (Qwen3-MoE).

The rows are sorted by expert, so that each expert is one product over its own rows: on CPU a loop
over the experts hit, on CUDA one grouped product over all of them, without a word to the host.
Each row's results are added up in the order of its own choices, and an expert's rows are padded
like those of any product: a row does not feel its company.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from executor_svc.torch_engine.config import ExpertsSpec
from executor_svc.torch_engine.linear import make_linear, pad_rows
from executor_svc.torch_engine.models.tensors import Weights


class Mlp:
    """SwiGLU feed-forward. All rows are alike to it, padding too."""

    def __init__(self, weights: Weights) -> None:
        self._gate_up = weights.linear("gate_proj", "up_proj")
        self._down = weights.linear("down_proj")
        self.row_multiple = self._down.row_multiple

    def __call__(self, x: Tensor, num_tokens: int) -> Tensor:  # [rows, hidden]
        return self._down(_gated(self._gate_up(x)))


class Experts:
    """The experts of one layer and their router."""

    def __init__(self, spec: ExpertsSpec, weights: Weights) -> None:
        self._spec = spec
        router = weights.tensor("gate.weight")
        self._router = make_linear(router)
        kind = GroupedExperts if _can_group(router) else ExpertLoop
        self._run = kind([weights.under(f"experts.{i}") for i in range(spec.num_experts)])

    def __call__(self, x: Tensor, num_tokens: int) -> Tensor:  # [rows, hidden]
        """Rows from ``num_tokens`` on are padding: they hit no expert and come out 0."""
        shares, chosen = self._route(x)
        shares, chosen = shares[:num_tokens], chosen[:num_tokens]
        order = chosen.flatten().argsort(stable=True)  # [tokens * chosen], by expert
        rows = x[order // chosen.shape[1]]
        results = torch.empty_like(rows)
        results[order] = self._run(rows, chosen.flatten()[order])
        mixed = torch.zeros_like(x)
        for i in range(chosen.shape[1]):
            mixed[:num_tokens] += shares[:, i, None] * results[i :: chosen.shape[1]]
        return mixed

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shares and numbers of the experts of each row, each [rows, chosen]."""
        likelihoods = self._router(pad_rows(x, self._router.row_multiple))[: x.shape[0]].softmax(
            -1, dtype=torch.float32
        )
        shares, chosen = likelihoods.topk(self._spec.num_experts_per_token, dim=-1)
        if self._spec.are_weights_normalized:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(x.dtype), chosen


def _can_group(weight: Tensor) -> bool:
    """torch's grouped product is made for bfloat16 on GPUs from the A100 on."""
    if weight.device.type != "cuda" or weight.dtype is not torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 0)


class ExpertLoop:
    """One product after the other, for the experts hit."""

    def __init__(self, experts: list[Weights]) -> None:
        self._experts = [Mlp(weights) for weights in experts]

    def __call__(self, rows: Tensor, expert_of: Tensor) -> Tensor:
        """``rows`` [rows, hidden] lie by expert, and ``expert_of`` [rows] says by which."""
        results = torch.empty_like(rows)
        numbers, counts = expert_of.unique_consecutive(return_counts=True)
        start = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            expert, mine = self._experts[number], slice(start, start + count)
            results[mine] = expert(pad_rows(rows[mine], expert.row_multiple), count)[:count]
            start += count
        return results


class GroupedExperts:
    """One grouped product for all experts."""

    def __init__(self, experts: list[Weights]) -> None:
        # [experts, out, in] each
        self._gate_up = torch.stack(
            [weights.tensor("gate_proj.weight", "up_proj.weight") for weights in experts]
        )
        self._down = torch.stack([weights.tensor("down_proj.weight") for weights in experts])

    def __call__(self, rows: Tensor, expert_of: Tensor) -> Tensor:
        """``rows`` [rows, hidden] lie by expert, and ``expert_of`` [rows] says by which."""
        counts = torch.zeros(len(self._down), dtype=torch.int32, device=rows.device)
        counts.scatter_add_(0, expert_of, torch.ones_like(expert_of, dtype=torch.int32))
        ends = counts.cumsum(0, dtype=torch.int32)
        gated = _gated(F.grouped_mm(rows, self._gate_up.mT, offs=ends))
        return F.grouped_mm(gated, self._down.mT, offs=ends)


def _gated(gate_up: Tensor) -> Tensor:  # [rows, 2 * inner] -> [rows, inner]
    if gate_up.is_cuda:
        from executor_svc.torch_engine.kernels.elementwise import silu_mul

        return silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
