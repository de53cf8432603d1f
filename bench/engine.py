"""Our engine beside transformers, on one CPU and one checkpoint.

    python -m bench.engine            a checkpoint in Qwen3-0.6B's shape, random, bfloat16
    python -m bench.engine --http     also through gateway and scheduler, with their processes
    python -m bench.engine --folder F a checkpoint that is there already
    python -m bench.engine --quick    a tiny shape, for tests

For each batch size both generate greedily from prompts of about a hundred tokens, in turns, and the
best of the turns counts: neighbours on the machine make runs slower, never faster. Rates count
output tokens over the whole time, prefill included; the time to the first token is that of one
prompt alone. ``bandwidth_share`` is what decoding one sequence reads of the weights in a second,
over what this machine was seen to read in the same run.

The last line is JSON: by batch size headway_tok_s, transformers_tok_s and their ratio, and the
figures above. With --http also http_tok_s by the number of requests at once, and
http_cpu_ms_per_token of each process: two cores have 2,000 / http_tok_s, and what is left of that
went into waiting.
"""

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bench.figures import cpu_s
from bench.stack import Stack
from executor_svc.core.engine import LeaseRequest, SamplingParams
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine

MODEL = "bench"
BATCHES = (1, 8, 32)
NUM_PROMPT_TOKENS = 100
_READ_BYTES = 1 << 30

QWEN3_06B: dict[str, Any] = {
    "hidden_size": 1_024,
    "intermediate_size": 3_072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Random weights in bfloat16; no tokenizer, prompts are token ids."""
    torch.manual_seed(0)
    config = Qwen3Config(**shape, tie_word_embeddings=True, max_position_embeddings=4_096)
    config.dtype = torch.bfloat16
    model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


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
        """Each of the batch's sequences to its end."""
        params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
        for prompt in self._prompts.take(batch):
            self._num_leases += 1
            self._engine.add(LeaseRequest(self._num_leases, MODEL, prompt, params))
        num_made = 0
        while self._engine.has_work():
            num_made += len(self._engine.step().key)
        assert num_made == batch * num_tokens


class Transformers:
    """``generate`` of the transformers package."""

    def __init__(self, folder: Path, prompts: Prompts) -> None:
        self._prompts = prompts
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def generate(self, batch: int, num_tokens: int) -> None:
        """Each of the batch's sequences to its end."""
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


def took_s(work: Callable[[], object]) -> float:
    """Seconds on the wall: all threads count."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def read_bytes_per_s() -> float:
    """The most that this machine was seen to read, with all threads."""
    data = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / min(took_s(data.sum) for _ in range(8))


def side_by_side(
    ours: Headway,
    theirs: Transformers,
    batches: tuple[int, ...],
    num_tokens: int,
    num_turns: int,
) -> dict[str, Any]:
    """Best rates by batch size, and times to the first token."""
    figures: dict[str, Any] = {}
    for batch in batches:
        best = {"headway": 0.0, "transformers": 0.0}
        for _ in range(num_turns):
            for name, engine in (("headway", ours), ("transformers", theirs)):
                seconds = took_s(partial(engine.generate, batch, num_tokens))
                best[name] = max(best[name], batch * num_tokens / seconds)
        ratio = best["headway"] / best["transformers"]
        print(
            f"batch {batch:2}: {best['headway']:7.1f} tok/s, "
            f"transformers {best['transformers']:7.1f}, ratio {ratio:.2f}",
            flush=True,
        )
        figures[str(batch)] = {
            "headway_tok_s": round(best["headway"], 1),
            "transformers_tok_s": round(best["transformers"], 1),
            "ratio": round(ratio, 2),
        }
    for name, engine in (("headway", ours), ("transformers", theirs)):
        first_s = min(took_s(partial(engine.generate, 1, 1)) for _ in range(2 * num_turns))
        print(f"first token of one prompt, {name}: {first_s * 1e3:.0f} ms", flush=True)
        figures[f"{name}_first_token_ms"] = round(first_s * 1e3)
    return figures


def decode_step_s(engine: Headway, num_tokens: int, num_turns: int) -> float:
    """One token of one sequence, prefill taken off."""
    whole_s = min(took_s(lambda: engine.generate(1, num_tokens)) for _ in range(num_turns))
    first_s = min(took_s(lambda: engine.generate(1, 1)) for _ in range(num_turns))
    return (whole_s - first_s) / (num_tokens - 1)


def weight_bytes(folder: Path) -> int:
    """What a step reads: all weights once, as the head is the embedding's matrix."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


async def _http_rate(url: str, prompts: list[list[int]], num_tokens: int) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(prompt: list[int]) -> None:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
            answer = await client.post("/v1/completions", json={**body, "ignore_eos": True})
            assert answer.json()["usage"]["completion_tokens"] == num_tokens, answer.text

        started_s = time.perf_counter()
        await asyncio.gather(*map(one, prompts))
        return len(prompts) * num_tokens / (time.perf_counter() - started_s)


def over_http(
    folder: Path,
    prompts: Prompts,
    batches: tuple[int, ...],
    num_tokens: int,
    num_threads: int,
    num_turns: int,
) -> dict[str, Any]:
    """Output tokens a second through gateway and scheduler, and what each process took for them."""
    settings = {
        "model": folder,
        "model_name": MODEL,
        "max_num_seqs": max(BATCHES),
        "num_threads": num_threads,
    }
    rates: dict[str, float] = {}
    costs: dict[str, dict[str, float]] = {}
    with Stack.start(engine="torch", executor=settings) as stack:
        processes = {
            "executor": stack.executors[0].pid,
            "scheduler": stack.scheduler.pid,
            "gateway": stack.gateway.pid,
            "client": os.getpid(),
        }
        for batch in batches:
            key = str(batch)
            rates[key] = 0.0
            for _ in range(num_turns):
                before_s = {name: cpu_s(pid) for name, pid in processes.items()}
                rate = asyncio.run(_http_rate(stack.gateway_url, prompts.take(batch), num_tokens))
                if rate > rates[key]:
                    rates[key] = round(rate, 1)
                    costs[key] = {
                        name: round(1e3 * (cpu_s(pid) - before_s[name]) / batch / num_tokens, 2)
                        for name, pid in processes.items()
                    }
            spent = ", ".join(f"{name} {cost:.2f}" for name, cost in costs[key].items())
            print(
                f"over HTTP, {batch:2} at once: {rates[key]:7.1f} tok/s; CPU ms a token: {spent}",
                flush=True,
            )
    return {"http_tok_s": rates, "http_cpu_ms_per_token": costs}


def main() -> None:
    """Print a line for each figure, and all of them as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a tiny shape and one turn")
    parser.add_argument("--http", action="store_true", help="also through the whole stack")
    parser.add_argument("--folder", type=Path, help="of a checkpoint; without, one is made")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="sizes to measure")
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--tokens", type=int, default=64, help="of each output")
    parser.add_argument("--turns", type=int, default=3, help="the best of which counts")
    arguments = parser.parse_args()
    shape = TINY if arguments.quick else QWEN3_06B
    num_turns = 1 if arguments.quick else arguments.turns
    num_threads = 1 if arguments.quick else arguments.threads
    batches = tuple(arguments.batches)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        if arguments.folder is None:
            make_checkpoint(folder, shape)
        prompts = Prompts(json.loads((folder / "config.json").read_text())["vocab_size"])
        ours = Headway(folder, prompts, num_threads)
        theirs = Transformers(folder, prompts)
        figures = side_by_side(ours, theirs, batches, arguments.tokens, num_turns)
        del theirs
        ceiling = read_bytes_per_s()
        step_s = decode_step_s(ours, arguments.tokens, num_turns)
        share = weight_bytes(folder) / step_s / ceiling
        print(
            f"decoding one: {step_s * 1e3:.1f} ms a token, {share:.0%} of {ceiling / 1e9:.0f} GB/s"
        )
        figures |= {"bandwidth_gb_s": round(ceiling / 1e9, 1), "bandwidth_share": round(share, 2)}
        del ours
        if arguments.http:
            figures |= over_http(folder, prompts, batches, arguments.tokens, num_threads, num_turns)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
