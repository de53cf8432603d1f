"""Our engine beside transformers, on one CPU and one checkpoint.

    python -m bench.engine            a checkpoint in Qwen3-0.6B's shape, random, bfloat16
    python -m bench.engine --http     also through gateway and scheduler, with their processes
    python -m bench.engine --folder F a checkpoint that is there already
    python -m bench.engine --quick    a tiny shape, for tests

For each batch size all generate greedily from prompts of a hundred tokens, in turns, and the best
of the turns counts: neighbours on the machine make runs slower, never faster. Rates count output
tokens over the whole time, prefill included; the time to the first token is that of one prompt
alone. ``bandwidth_share`` is what decoding one sequence reads of the weights in a second, over what
all threads read in one from a buffer of the same size: both in turns a second apart, since this
changes with the neighbours by the minute. The median of the turns counts.

Over HTTP a batch is as many requests at once, each answered in one piece, and the time is that from
the first one's sending to the last one's answer.

The last line is JSON: by batch size headway_tok_s, transformers_tok_s and their ratio, and the
figures above. With --http also http_tok_s, and http_share, which is the median over the turns of
that rate over headway's of the same turn. ``cpu_ms_per_token`` are those of each one's processes in
its best turn: two cores have 2,000 / tok_s, and what is left of that went into waiting.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.arguments import parser_of
from bench.engine_contenders import (
    BATCHES,
    MODEL,
    Contender,
    Headway,
    OverHttp,
    Prompts,
    Transformers,
)
from bench.stack import Stack

_READS_A_TURN = 4

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


def took_s(work: Callable[[], object]) -> float:
    """Seconds on the wall: all threads count."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


@dataclass(frozen=True, slots=True)
class Turn:
    """How a batch went."""

    tok_s: float
    cpu_ms_per_token: dict[str, float]  # by process

    @staticmethod
    def of(contender: Contender, batch: int, num_tokens: int) -> "Turn":
        before_s = contender.cpu_s()
        seconds = took_s(partial(contender.generate, batch, num_tokens))
        after_s, count = contender.cpu_s(), batch * num_tokens
        cost = {name: round(1e3 * (after_s[name] - before_s[name]) / count, 2) for name in after_s}
        return Turn(count / seconds, cost)


def side_by_side(
    contenders: Mapping[str, Contender], batches: tuple[int, ...], num_tokens: int, num_turns: int
) -> dict[str, Any]:
    """Rates by batch size, and times to the first token."""
    figures: dict[str, Any] = {}
    for batch in batches:
        turns: dict[str, list[Turn]] = {name: [] for name in contenders}
        for _ in range(num_turns):
            for name, contender in contenders.items():
                turns[name].append(Turn.of(contender, batch, num_tokens))
        figures[str(batch)] = found = _compared(turns)
        print(f"batch {batch}: {found}", flush=True)
    for name, contender in contenders.items():
        first_s = min(took_s(partial(contender.generate, 1, 1)) for _ in range(2 * num_turns))
        print(f"first token of one prompt, {name}: {first_s * 1e3:.0f} ms", flush=True)
        figures[f"{name}_first_token_ms"] = round(first_s * 1e3)
    return figures


def _compared(turns: Mapping[str, list[Turn]]) -> dict[str, Any]:
    """The best turn of each, and what one contender has of another."""
    found: dict[str, Any] = {}
    best = {name: max(turns[name], key=lambda turn: turn.tok_s) for name in turns}
    for name, turn in best.items():
        found[f"{name}_tok_s"] = round(turn.tok_s, 1)
        found[f"{name}_cpu_ms_per_token"] = turn.cpu_ms_per_token
    found["ratio"] = round(best["headway"].tok_s / best["transformers"].tok_s, 2)
    if "http" in turns:
        pairs = zip(turns["http"], turns["headway"], strict=True)
        shares = [there.tok_s / here.tok_s for there, here in pairs]
        found["http_share"] = round(statistics.median(shares), 2)
    return found


def beside_reading(
    engine: Headway, num_bytes: int, num_tokens: int, num_turns: int
) -> dict[str, Any]:
    """Decode steps of one sequence, which read so many bytes of weights, beside reading alone."""
    data = torch.ones(num_bytes // 4)
    turns = []
    for _ in range(num_turns):
        rate = num_bytes / min(took_s(data.sum) for _ in range(_READS_A_TURN))
        step_s = statistics.median(engine.decode_steps_s(num_tokens))
        turns.append((num_bytes / step_s / rate, step_s, rate))
        print(
            f"decoding one: {step_s * 1e3:.1f} ms a token, {turns[-1][0]:.0%} of"
            f" {rate / 1e9:.0f} GB/s",
            flush=True,
        )
    share, step_s, rate = sorted(turns)[num_turns // 2]
    return {
        "bandwidth_gb_s": round(rate / 1e9, 1),
        "bandwidth_share": round(share, 2),
        "decode_step_ms": round(step_s * 1e3, 1),
    }


def weight_bytes(folder: Path) -> int:
    """What a step reads: all weights once, as the head is the embedding's matrix."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def start_stack(folder: Path, num_threads: int) -> Stack:
    """One executor with the same model and threads."""
    settings = {
        "model": folder,
        "model_name": MODEL,
        "max_num_seqs": max(BATCHES),
        "num_threads": num_threads,
    }
    return Stack.start(engine="torch", executor=settings)


def main() -> None:
    """Print a line for each figure, and all of them as JSON at the end."""
    parser = parser_of("bench.engine", __doc__)
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
        contenders: dict[str, Contender] = {"headway": ours}
        with ExitStack() as exits:
            if arguments.http:
                stack = exits.enter_context(start_stack(folder, num_threads))
                contenders["http"] = OverHttp(stack, prompts)
            contenders["transformers"] = Transformers(folder, prompts)
            figures = side_by_side(contenders, batches, arguments.tokens, num_turns)
        figures |= beside_reading(ours, weight_bytes(folder), arguments.tokens, 2 * num_turns + 1)
    print(json.dumps({"bench": "engine", **figures}))


if __name__ == "__main__":
    main()
