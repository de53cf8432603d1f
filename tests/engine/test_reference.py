"""Tokens and logprobs equal those of transformers, in float32, in one continuous batch."""

import random
from pathlib import Path

import pytest
import torch

from executor_svc.core.engine import SamplingParams
from tests.engine.checkpoints import reference_model
from tests.engine.conftest import CHECKPOINTS
from tests.engine.driving import build, lease, run

NUM_PROMPTS = 56
MAX_DIFFERENCE = 1e-4


def _prompts(seed: int) -> list[list[int]]:
    """Lengths from 1 to 300: several key tiles, and prefills cut into chunks."""
    draw = random.Random(seed)
    lengths = [1, 2, 127, 128, 129, 300] + [draw.randint(1, 90) for _ in range(NUM_PROMPTS - 6)]
    draw.shuffle(lengths)
    return [[draw.randrange(3, 320) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_equals_transformers(checkpoints: dict[str, Path], name: str) -> None:
    engine = build(checkpoints[name], max_num_seqs=24, max_num_batched_tokens=100)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    prompts = _prompts(seed=1)
    record = run(engine, *(lease(key, prompt, params) for key, prompt in enumerate(prompts)))

    model = reference_model(checkpoints[name])
    worst = 0.0
    for key, prompt in enumerate(prompts):
        tokens = record.tokens[key]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert tokens == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        worst = max(worst, (expected - torch.tensor(record.logprobs[key])).abs().max().item())
    print(f"{name}: {len(prompts)} prompts, max |logprob difference| = {worst:.1e}")
    assert worst < MAX_DIFFERENCE


def test_logprobs_are_those_of_the_scaled_distribution_before_any_cut(qwen3: Path) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.6, top_k=5, top_p=0.8, ignore_eos=True)
    prompt = [5, 6, 7, 8]
    record = run(build(qwen3), lease(0, prompt, params))
    tokens = record.tokens[0]
    with torch.no_grad():
        logits = reference_model(qwen3)(torch.tensor([prompt + tokens[:-1]])).logits[0, 3:]
    expected = (logits / 0.6).log_softmax(-1)[torch.arange(len(tokens)), tokens]
    assert torch.allclose(expected, torch.tensor(record.logprobs[0]), atol=MAX_DIFFERENCE)


def test_bfloat16_runs_and_stays_near_float32(qwen3: Path) -> None:
    params = SamplingParams(max_tokens=1, temperature=0)
    wide = run(build(qwen3), lease(0, [9, 8, 7], params))
    narrow = run(build(qwen3, dtype="bfloat16"), lease(0, [9, 8, 7], params))
    assert narrow.logprobs[0] == pytest.approx(wide.logprobs[0], abs=0.2)
