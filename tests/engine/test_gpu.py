"""On a CUDA device: graphs, kernels and overlap give what the plain way gives, bit for bit.

Without a device the same is tested in Triton's interpreter (kernel_cases/) and on the CPU
(test_overlap.py); what these add is the device itself.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from executor_svc.core.engine import LeaseRequest, SamplingParams
from executor_svc.torch_engine.sampler import Row, SamplingBatch, sample
from tests.engine.driving import Record, build, lease, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPT = [(7 * i) % 300 + 3 for i in range(140)]


def leases() -> list[LeaseRequest]:
    """Greedy and drawn rows, with stops that nobody foresees, and some that no graph can draw."""
    params = [
        SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=24, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=24, seed=2, top_k=40, top_p=0.9, min_p=0.01),
        SamplingParams(max_tokens=24, seed=3, stop_token_ids=tuple(range(50, 90))),
        SamplingParams(max_tokens=24, seed=4, top_logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=6, seed=5, repetition_penalty=1.2, ignore_eos=True),
    ]
    return [lease(i, PROMPT[i : 5 + 25 * i], each) for i, each in enumerate(params)]


def generate(folder: Path, **settings: Any) -> Record:
    settings = {"device": "cuda", "dtype": "bfloat16", "kv_bytes": 1 << 24} | settings
    return run(build(folder, **settings), *leases())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "change", [{"enforce_eager": True}, {"overlap_scheduling": False}], ids=str
)
def test_graphs_and_overlap_change_no_bit(qwen3: Path, dtype: str, change: dict[str, Any]) -> None:
    usual, other = generate(qwen3, dtype=dtype), generate(qwen3, dtype=dtype, **change)
    assert other.tokens == usual.tokens
    assert other.logprobs == usual.logprobs
    assert other.ends == usual.ends


def test_preemption_and_little_memory_change_no_bit(qwen3: Path) -> None:
    tight = {"num_blocks": 14, "max_num_batched_tokens": 40}
    assert generate(qwen3, **tight).tokens == generate(qwen3).tokens


def test_the_device_draws_what_the_host_draws() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(32, 151_936, generator=draw) * torch.linspace(0.1, 8, 32)[:, None]
    params = SamplingParams(1, temperature=0.9, top_k=50, top_p=0.95, min_p=0.001)
    changes: list[dict[str, Any]] = [{}, {"top_k": 0}, {"top_p": 1.0}]
    for change in (*changes, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}):
        rows = [Row.of(replace(params, seed=i, **change), 0, ()) for i in range(32)]
        indices = [3 * i for i in range(32)]
        wanted = sample(logits, SamplingBatch(rows, indices))
        batch = SamplingBatch(
            rows, indices, (), lambda x: torch.from_numpy(x).cuda(), with_kernels=True
        )
        got = sample(logits.cuda(), batch)
        # exp is not the same function on both, so a draw next to a border may go either way.
        assert int((got.token_ids.cpu() != wanted.token_ids).sum()) <= 1
        assert torch.allclose(got.logprobs.cpu(), wanted.logprobs, atol=1e-4)
