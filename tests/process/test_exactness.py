"""Tokens and logprobs through the whole stack equal transformers on the same checkpoint."""

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.stack import Stack
from tests.engine.checkpoints import make_checkpoint

NUM_PROMPTS = 56
NUM_TOKENS = 24
TOLERANCE = 2e-4


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Mixed lengths, from one token to a few chunks of prefill."""
    draw = random.Random(11)
    lengths = [1, 2, 3, 17, 31, 64, 150] + [draw.randint(4, 90) for _ in range(NUM_PROMPTS - 7)]
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


async def sample(client: httpx.AsyncClient, model: str, number: int, prompt: list[int]) -> Any:
    """One greedy sample by the Tinker endpoints, which speak token ids both ways."""
    answer = await client.post(
        "/api/v1/asample",
        json={
            "base_model": model,
            "seq_id": number,
            "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "sampling_params": {"max_tokens": NUM_TOKENS, "temperature": 0.0, "stop": []},
        },
    )
    answer.raise_for_status()
    future = {"request_id": answer.json()["request_id"]}
    headers = {"X-Tinker-Request-Type": "Sample", "Accept": "application/json"}
    while True:
        result = await client.post("/api/v1/retrieve_future", json=future, headers=headers)
        if result.status_code != 408:
            result.raise_for_status()
            return result.json()["sequences"][0]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
async def test_greedy_through_the_whole_stack_equals_transformers(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / family
    make_checkpoint(folder, family=family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = make_prompts(reference.config.vocab_size)
    settings = {"model": folder, "model_name": family, "dtype": "float32", "max_num_seqs": 64}
    with Stack.start(engine="torch", executor=settings) as stack:
        async with httpx.AsyncClient(base_url=stack.gateway_url, timeout=60) as client:
            sequences = await asyncio.gather(
                *(sample(client, family, *numbered) for numbered in enumerate(prompts))
            )
    worst = 0.0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        tokens = sequence["tokens"]
        assert len(tokens) == NUM_TOKENS
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()
        expected = logits.float().log_softmax(-1)[torch.arange(NUM_TOKENS), tokens]
        difference = (torch.tensor(sequence["logprobs"]) - expected).abs().max().item()
        worst = max(worst, difference)
    with capsys.disabled():
        print(
            f"\n{family}: {len(prompts)} prompts x {NUM_TOKENS} tokens equal transformers, "
            f"max |difference of logprob| {worst:.1e}"
        )
    assert worst < TOLERANCE
