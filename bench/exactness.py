"""Does a sequence go on unchanged when another engine takes it over? Counts every difference.

    python -m bench.exactness            2,000 sequences for each dtype, a few minutes on one core
    python -m bench.exactness --quick    8 for each, for tests

One engine runs all leases to their end. Each sample is then cut at a random index, and another
engine gets its prompt and the tokens before the cut, and draws the rest; tokens, logprobs and
alternatives must be the same, bit for bit. The takers differ from the first engine and from each
other in seats, chunk size, block size, prefix cache and memory (one has to preempt), and get the
leases in another order, so that nothing has the company that it had.

The model is the built-in one (3.9 million parameters, 5 layers, hidden size 256, vocabulary 4,096).
Prompts have 1 to 160 tokens, a third of them begin alike; outputs have 1 to 24. Half of the leases
are greedy, the others have temperatures, cuts, penalties and 1 to 3 samples.

The last line is JSON; ``differences`` counts sequences, and must be 0.
"""

import json
import platform
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from bench.arguments import parser_of
from executor_svc.core.engine import LeaseRequest, SamplingParams, StepOutput
from executor_svc.settings import BUILTIN_MODEL
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine

DTYPES = ("float32", "bfloat16")
NUM_SEQUENCES, NUM_SEQUENCES_QUICK = 2_000, 8
MAX_PROMPT, MAX_TOKENS, MAX_SAMPLES = 160, 24, 3
COMMON_TOKENS = 70
_MODEL = "model"
_KEY_STEP = 10  # from lease to lease; more than samples

FIRST: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "block_size": 16}
TAKERS: dict[str, dict[str, Any]] = {
    "small chunks": {"max_num_seqs": 7, "max_num_batched_tokens": 13, "block_size": 16},
    "large steps": {"max_num_seqs": 64, "max_num_batched_tokens": 2_048, "block_size": 64},
    "no cache": {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 100,
        "block_size": 8,
        "enable_prefix_caching": False,
    },
    # 24 blocks of 8 tokens hold the longest sequence, and the beginnings of a few others.
    "little memory": {
        "max_num_seqs": 32,
        "max_num_batched_tokens": 64,
        "block_size": 8,
        "num_blocks": 24,
    },
}


@dataclass(slots=True)
class Stream:
    """What one sequence gave; compared by bits, since no number here is a NaN."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, ...], tuple[float, ...]]] = field(default_factory=list)

    def after(self, index: int) -> "Stream":
        return Stream(self.token_ids[index:], self.logprobs[index:], self.tops[index:])


def make_leases(rng: random.Random, num_sequences: int, vocab_size: int) -> list[LeaseRequest]:
    """Leases with so many samples altogether."""
    common = [rng.randrange(vocab_size) for _ in range(COMMON_TOKENS)]
    leases: list[LeaseRequest] = []
    while num_sequences > 0:
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, MAX_PROMPT))]
        if rng.random() < 1 / 3:
            prompt = (common + prompt)[:MAX_PROMPT]
        is_greedy = rng.random() < 0.5
        num_samples = 1 if is_greedy else min(rng.randint(1, MAX_SAMPLES), num_sequences)
        params = SamplingParams(
            max_tokens=rng.randint(1, MAX_TOKENS),
            temperature=0.0 if is_greedy else rng.choice((0.3, 0.7, 1.0, 1.3)),
            top_k=0 if is_greedy else rng.choice((0, 0, 5, 50)),
            top_p=1.0 if is_greedy else rng.choice((1.0, 0.95, 0.7)),
            min_p=0.0 if is_greedy else rng.choice((0.0, 0.05)),
            seed=rng.getrandbits(64),
            ignore_eos=True,
            top_logprobs=rng.choice((0, 0, 3)),
            presence_penalty=rng.choice((0.0, 0.0, 0.5)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.5)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
        )
        key = _KEY_STEP * len(leases)
        leases.append(LeaseRequest(key, _MODEL, prompt, params, num_samples=num_samples))
        num_sequences -= num_samples
    return leases


def run(engine: TorchEngine, leases: Iterable[LeaseRequest]) -> dict[int, Stream]:
    """All streams by sequence key; raises RuntimeError if a lease fails."""
    streams: dict[int, Stream] = {}
    for lease in leases:
        engine.add(lease)
    while engine.has_work():
        output = engine.step()
        if output.failures:
            raise RuntimeError(output.failures[0].detail)
        take(output, streams)
    return streams


def take(output: StepOutput, streams: dict[int, Stream]) -> None:
    """Add a step's tokens to their streams."""
    tops = iter(zip(output.top_token_id, output.top_logprob, strict=True))
    for i, key in enumerate(output.key):
        stream = streams.setdefault(key, Stream())
        stream.token_ids.append(output.token_id[i])
        stream.logprobs.append(output.logprob[i])
        top = list(islice(tops, output.num_top[i] if output.num_top else 0))
        stream.tops.append((tuple(t for t, _ in top), tuple(p for _, p in top)))


def interrupted(rng: random.Random, lease: LeaseRequest, whole: dict[int, Stream]) -> LeaseRequest:
    """The lease as another engine gets it after each sample was cut somewhere."""
    generated = []
    for sample in range(lease.num_samples):
        token_ids = whole[lease.key + sample].token_ids
        generated.append(tuple(token_ids[: rng.randrange(len(token_ids))]))
    return replace(lease, generated=tuple(generated))


def differences(lease: LeaseRequest, whole: dict[int, Stream], rest: dict[int, Stream]) -> int:
    """How many of the lease's samples did not go on as they would have."""
    return sum(
        rest.get(lease.key + sample) != whole[lease.key + sample].after(len(held))
        for sample, held in enumerate(lease.generated)
    )


def measure(dtype: str, num_sequences: int, seed: int) -> dict[str, Any]:
    """All sequences of one dtype."""
    rng = random.Random(seed)
    started_s = time.process_time()
    first = build(dtype, FIRST)
    leases = make_leases(rng, num_sequences, first.models[0].vocab_size)
    whole = run(first, leases)
    cut = [interrupted(rng, lease, whole) for lease in leases]
    rng.shuffle(cut)
    num_differences: Counter[str] = Counter()
    num_taken: Counter[str] = Counter()
    num_preemptions: dict[str, int] = {}
    num_tokens = 0
    print(f"{dtype}: {len(leases)} leases ran to their end", flush=True)
    for number, (name, settings) in enumerate(TAKERS.items()):
        mine = cut[number :: len(TAKERS)]
        engine = build(dtype, settings)
        rest = run(engine, mine)
        num_preemptions[name] = engine.num_preemptions
        num_tokens += sum(len(stream.token_ids) for stream in rest.values())
        for lease in mine:
            num_taken[name] += lease.num_samples
            num_differences[name] += differences(lease, whole, rest)
        print(f"{dtype}, {name}: {num_differences[name]} of {num_taken[name]} differ", flush=True)
    return {
        "dtype": dtype,
        "sequences": sum(num_taken.values()),
        "tokens_compared": num_tokens,
        "differences": sum(num_differences.values()),
        "sequences_of": dict(num_taken),
        "differences_of": dict(num_differences),
        "preemptions_of": num_preemptions,
        "exactness_class": first.models[0].exactness_class,
        "cpu_s": round(time.process_time() - started_s, 1),
    }


def build(dtype: str, settings: dict[str, Any]) -> TorchEngine:
    """An engine with the built-in model on one thread."""
    settings = {"kv_bytes": 1 << 26} | settings
    return TorchEngine(
        EngineConfig(models=((_MODEL, str(BUILTIN_MODEL)),), dtype=dtype, num_threads=1, **settings)
    )


def main() -> None:
    """Measure and print."""
    parser = parser_of("bench.exactness", __doc__)
    parser.add_argument("--quick", action="store_true", help="few sequences")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    num_sequences = NUM_SEQUENCES_QUICK if arguments.quick else NUM_SEQUENCES
    results = [measure(dtype, num_sequences, arguments.seed) for dtype in DTYPES]
    print(
        json.dumps(
            {
                "bench": "exactness",
                "sequences": sum(result["sequences"] for result in results),
                "differences": sum(result["differences"] for result in results),
                "seed": arguments.seed,
                "torch": torch.__version__,
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "python": platform.python_version(),
                "by_dtype": results,
            }
        )
    )


if __name__ == "__main__":
    main()
