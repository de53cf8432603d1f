"""An engine against transformers, in every way in which it may run the same leases.

``compare(folder)`` runs one checkpoint through all modes and gives a row for each;
``python -m tests.engine.equality`` prints the table for all checkpoints of conftest.py.
"""

import itertools
import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from executor_svc.core.engine import LeaseRequest, SamplingParams
from tests.engine.checkpoints import make_checkpoint, reference_model
from tests.engine.driving import Record, build, lease, run

MAX_DIFFERENCE = 1e-4  # of a logprob in float32
MAX_TOKENS = 16
_BLOCK_SIZE = 8
_PARAMS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
# Lengths around the edges of blocks (8), key tiles (128) and steps; 70 tokens are common to all
# that are longer.
_COMMON = 70
_LENGTHS = (8, 9, 31, 1, 2, 71, 79, 80, 128, 129, 127, 190)


@dataclass(frozen=True, slots=True)
class Mode:
    """How the engine runs."""

    prefix_caching: bool
    chunked: bool
    preempted: bool
    num_samples: int

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "enable_prefix_caching": self.prefix_caching,
            "block_size": _BLOCK_SIZE,
            "max_num_seqs": 24,
            # Most prompts are longer than the smaller one.
            "max_num_batched_tokens": 37 if self.chunked else 4096,
            # The longest lease just fits.
            "num_blocks": 26 if self.preempted else 1024,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """What one mode gave, all its sequences together."""

    mode: Mode
    num_sequences: int
    num_tokens: int
    num_other_tokens: int  # not those of transformers
    max_difference: float  # of a logprob
    num_cached_tokens: int
    num_preemptions: int
    num_steps: int

    @property
    def is_equal(self) -> bool:
        return self.num_other_tokens == 0 and self.max_difference < MAX_DIFFERENCE


def modes() -> Iterator[Mode]:
    for caching, chunked, preempted in itertools.product((True, False), repeat=3):
        for num_samples in (1, 3):
            yield Mode(caching, chunked, preempted, num_samples)


def compare(folder: Path, wanted: Iterable[Mode] | None = None) -> list[Row]:
    """These modes of one checkpoint, or all of them.

    Greedy tokens and logprobs are compared; n samples of a greedy lease are n times the same.
    Raises AssertionError if a mode did not do what its name says.
    """
    prompts = _prompts()
    expected = _reference(folder, tuple(map(tuple, prompts)))
    return [_row(folder, mode, prompts, expected) for mode in wanted or modes()]


def table(name: str, rows: Iterable[Row]) -> str:
    """One line for each mode; see HEADER."""
    lines = []
    for row in rows:
        mode = row.mode
        words = (
            "cache" if mode.prefix_caching else "-",
            "chunks" if mode.chunked else "-",
            "preempted" if mode.preempted else "-",
            f"n={mode.num_samples}",
        )
        lines.append(
            f"{name:20} {words[0]:6} {words[1]:7} {words[2]:10} {words[3]:4}"
            f" {row.num_sequences:9} {row.num_tokens:7} {row.num_other_tokens:6}"
            f" {row.max_difference:9.1e} {row.num_cached_tokens:7} {row.num_preemptions:11}"
            f" {row.num_steps:6}"
        )
    return "\n".join(lines)


HEADER = (
    f"{'model':20} {'how it ran':30} {'sequences':>9} {'tokens':>7} {'differ':>6}"
    f" {'max diff':>9} {'cached':>7} {'preemptions':>11} {'steps':>6}"
)


def _prompts() -> list[list[int]]:
    draw = random.Random(7)
    common = [draw.randrange(3, 320) for _ in range(_COMMON)]
    prompts = []
    for length in _LENGTHS:
        start = common if length > _COMMON else []
        prompts.append(start + [draw.randrange(3, 320) for _ in range(length - len(start))])
    return prompts


@cache
def _reference(
    folder: Path, prompts: tuple[tuple[int, ...], ...]
) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their logprobs of each prompt, by full forward passes."""
    model = reference_model(folder)
    expected = []
    for prompt in prompts:
        tokens: list[int] = []
        logprobs: list[float] = []
        for _ in range(MAX_TOKENS):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        expected.append((tokens, logprobs))
    return expected


def _row(
    folder: Path,
    mode: Mode,
    prompts: list[list[int]],
    expected: list[tuple[list[int], list[float]]],
) -> Row:
    engine = build(folder, **mode.settings)
    # Twice, so that with a cache the second time finds what the first one left.
    records = [run(engine, *_leases(mode, prompts)) for _ in range(2)]
    tokens = other = 0
    worst = 0.0
    for record, (lease_index, (wanted, wanted_logprobs)) in itertools.product(
        records, enumerate(expected)
    ):
        for key in range(lease_index * 10, lease_index * 10 + mode.num_samples):
            tokens += len(wanted)
            other += _num_other(record.tokens[key], wanted)
            pairs = zip(record.logprobs[key], wanted_logprobs, strict=True)
            worst = max(worst, *(abs(a - b) for a, b in pairs))
    row = Row(
        mode=mode,
        num_sequences=2 * len(prompts) * mode.num_samples,
        num_tokens=tokens,
        num_other_tokens=other,
        max_difference=worst,
        num_cached_tokens=sum(sum(record.num_cached.values()) for record in records),
        num_preemptions=engine.num_preemptions,
        num_steps=sum(record.num_steps for record in records),
    )
    _check_mode(row, records)
    return row


def _leases(mode: Mode, prompts: list[list[int]]) -> list[LeaseRequest]:
    return [
        lease(10 * index, prompt, _PARAMS, num_samples=mode.num_samples)
        for index, prompt in enumerate(prompts)
    ]


def _num_other(tokens: list[int], wanted: list[int]) -> int:
    assert len(tokens) == len(wanted)
    return sum(a != b for a, b in zip(tokens, wanted, strict=True))


def _check_mode(row: Row, records: list[Record]) -> None:
    assert not any(record.failures for record in records)
    assert (row.num_preemptions > 0) == row.mode.preempted, row
    assert (row.num_cached_tokens > 0) == row.mode.prefix_caching, row


def main() -> None:
    from tests.engine.conftest import CHECKPOINTS

    torch.set_num_threads(1)
    print(HEADER)
    num_rows = num_equal = 0
    checkpoints: dict[str, Any] = dict(CHECKPOINTS)
    for name, options in checkpoints.items():
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(make_checkpoint(Path(folder) / name, **options))
        print(table(name, rows), flush=True)
        num_rows += len(rows)
        num_equal += sum(row.is_equal for row in rows)
    print(f'{{"modes": {num_rows}, "equal": {num_equal}}}')


if __name__ == "__main__":
    main()
