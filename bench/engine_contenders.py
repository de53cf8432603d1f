"""Who takes part in bench/engine.py: each generates batches of outputs from random prompts."""

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any, Protocol

import httpx
import torch
from transformers import AutoModelForCausalLM

from bench.figures import cpu_s
from bench.stack import Stack
from executor_svc.core.engine import LeaseRequest, SamplingParams
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine

MODEL = "bench"
BATCHES = (1, 8, 32)
NUM_PROMPT_TOKENS = 100


class Prompts:
    """Random ones, never the same again, so that no cache helps."""

    def __init__(self, vocab_size: int) -> None:
        self._random = random.Random(0)
        self._vocab_size = vocab_size

    def take(self, count: int) -> list[list[int]]:
        """So many prompts as token ids."""
        return [
            [self._random.randrange(self._vocab_size) for _ in range(NUM_PROMPT_TOKENS)]
            for _ in range(count)
        ]


class Contender(Protocol):
    """Who generates."""

    def generate(self, batch: int, num_tokens: int) -> None:
        """Each of the batch's sequences to its end."""
        ...

    def cpu_s(self) -> dict[str, float]:
        """What its processes have used until now, by their names."""
        ...


class Headway:
    """Our engine, driven as its worker drives it."""

    def __init__(self, folder: Path, prompts: Prompts, num_threads: int) -> None:
        self._prompts = prompts
        self._engine = TorchEngine(
            EngineConfig(
                models=((MODEL, str(folder)),), max_num_seqs=max(BATCHES), num_threads=num_threads
            )
        )
        self._num_leases = 0

    def generate(self, batch: int, num_tokens: int) -> None:
        params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
        for prompt in self._prompts.take(batch):
            self._num_leases += 1
            self._engine.add(LeaseRequest(self._num_leases, MODEL, prompt, params))
        num_made = 0
        while self._engine.has_work():
            num_made += len(self._engine.step().key)
        assert num_made == batch * num_tokens

    def decode_steps_s(self, num_tokens: int) -> list[float]:
        """Seconds of each decode step of one sequence; the first token comes from the prefill."""
        self._num_leases += 1
        params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
        (prompt,) = self._prompts.take(1)
        self._engine.add(LeaseRequest(self._num_leases, MODEL, prompt, params))
        took_s = []
        while self._engine.has_work():
            started_s = time.perf_counter()
            if self._engine.step().num_decoded:
                took_s.append(time.perf_counter() - started_s)
        return took_s

    def cpu_s(self) -> dict[str, float]:
        return {"process": time.process_time()}


class Transformers:
    """``generate`` of the transformers package."""

    def __init__(self, folder: Path, prompts: Prompts) -> None:
        self._prompts = prompts
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def generate(self, batch: int, num_tokens: int) -> None:
        tokens = torch.tensor(self._prompts.take(batch))
        with torch.inference_mode():
            out = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
            )
        assert out.shape == (batch, NUM_PROMPT_TOKENS + num_tokens)

    def cpu_s(self) -> dict[str, float]:
        return {"process": time.process_time()}


class OverHttp:
    """Our engine again, behind gateway and scheduler."""

    def __init__(self, stack: Stack, prompts: Prompts) -> None:
        self._prompts = prompts
        self._url = stack.gateway_url
        self._pids = {
            "executor": stack.executors[0].pid,
            "scheduler": stack.scheduler.pid,
            "gateway": stack.gateway.pid,
            "client": os.getpid(),
        }

    def generate(self, batch: int, num_tokens: int) -> None:
        asyncio.run(self._ask(self._prompts.take(batch), num_tokens))

    async def _ask(self, prompts: list[list[int]], num_tokens: int) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=600) as client:

            async def one(prompt: list[int]) -> None:
                body = {"model": MODEL, "prompt": prompt, "max_tokens": num_tokens}
                body |= {"temperature": 0, "ignore_eos": True}
                answer = await client.post("/v1/completions", json=body)
                assert answer.json()["usage"]["completion_tokens"] == num_tokens, answer.text

            await asyncio.gather(*map(one, prompts))

    def cpu_s(self) -> dict[str, float]:
        return {name: cpu_s(pid) for name, pid in self._pids.items()}
