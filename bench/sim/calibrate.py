"""``python -m bench.sim.calibrate``: the constants of costs.py from steps of a real engine.

Either of an engine that is driven in this process (``--engine``): n sequences with prompts of p
tokens start together, so the first step is all prefill and every later one decodes n sequences. Or
of an executor at work (``--at-work``, bench/sim/at_work.py, with as many requests): prompts join
while others decode. Or of executors that ran (``--log``: the file of their setting ``step_log``,
executor_svc/step_log.py).

Steps that computed the same are repeats of one kind, and one of them counts for all: the one at
``--quantile``. On a CPU that others use too that is to be 0, the best, since they can only make a
step longer; an engine that keeps time, as the mock does, makes up for late steps, and wants the
median. Kinds are fitted by non-negative least squares, on the relative error, to

    step time = step_ms + sequence_ms x rows of one token + prefill_ms x tokens of longer chunks

in milliseconds. Every second kind is left out of the fit, and the errors are of those. A mock
engine sleeps, so it is timed by the wall, and so are steps at work and of a log unless
``--thread-time``; torch that is driven in this process by its CPU time. Ends with one line of
JSON.
"""

import argparse
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from bench.arguments import parser_of
from bench.sim import at_work
from executor_svc.core.engine import Engine, LeaseRequest, SamplingParams
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.settings import BUILTIN_MODEL

_BATCHES = (1, 2, 3, 4, 6, 8)
# n x p stays within the tokens of one step, so that a prompt is prefilled in one
_PROMPTS = (4, 8, 16, 32, 48, 64)
_NUM_TOKENS = 12
_MAX_BATCHED_TOKENS = 512
# at work: kinds that came less often say little
_LEAST_REPEATS = 3


class Row(NamedTuple):
    """A step, or one for all that computed the same: rows of one token, tokens of longer chunks,
    milliseconds."""

    num_decoded: int
    num_prefilled: int
    ms: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The constants, and how far they were off on kinds of steps that were not fitted."""

    step_ms: float
    sequence_ms: float
    prefill_ms: float
    p50_relative_error: float
    p90_relative_error: float


def fit(rows: list[Row]) -> Fit:
    """Fit every second row, judge by the others; needs at least four rows."""
    constants = non_negative_least_squares(_matrix(rows[::2]), np.ones(len(rows[::2])))
    errors = np.abs(_matrix(rows[1::2]) @ constants - 1)
    step_ms, sequence_ms, prefill_ms = map(float, constants)
    p50, p90 = map(float, np.quantile(errors, (0.5, 0.9)))
    return Fit(step_ms, sequence_ms, prefill_ms, p50, p90)


def kinds(steps: Iterable[Row], quantile: float, least_repeats: int = 1) -> list[Row]:
    """One row for each kind of step that came often enough, in order of kinds."""
    times: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for num_decoded, num_prefilled, ms in steps:
        times[num_decoded, num_prefilled].append(ms)
    return [
        Row(*kind, float(np.quantile(ms, quantile)))
        for kind, ms in sorted(times.items())
        if len(ms) >= least_repeats
    ]


def _matrix(rows: list[Row]) -> np.ndarray:
    """[rows, 3]; divided by the time, so that the right-hand side is 1 and errors are relative."""
    counts = [[1, row.num_decoded, row.num_prefilled] for row in rows]
    relative: np.ndarray = np.array(counts) / np.array([[row.ms] for row in rows])
    return relative


def non_negative_least_squares(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The x >= 0 with the least |matrix x - wanted|; matrix  # [rows, columns], few columns.

    The solution is the plain one on some set of columns with the rest at 0 (Lawson and Hanson,
    "Solving Least Squares Problems", chapter 23); with three columns all sets are tried.
    """
    num = matrix.shape[1]
    best, best_error = np.zeros(num), float(wanted @ wanted)
    for size in range(1, num + 1):
        for columns in itertools.combinations(range(num), size):
            chosen = list(columns)
            part = np.linalg.lstsq(matrix[:, chosen], wanted, rcond=None)[0]
            x = np.zeros(num)
            x[chosen] = part
            error = float(np.sum((matrix @ x - wanted) ** 2))
            if part.min() >= 0 and error < best_error:
                best, best_error = x, error
    return best


def drive(engine: Engine, clock: Callable[[], float], num_repeats: int) -> list[Row]:
    """Put an engine through all kinds of steps; its first model, which must be resident.

    Repeats are as far apart as they can be, so that not all of one kind fall into the same rush.
    """
    keys = itertools.count(1, 16)
    _run(engine, 2, 8, keys, clock)  # first steps load code and memory
    steps = []
    for repeat in range(1, num_repeats + 1):
        for num_sequences, num_prompt_tokens in itertools.product(_BATCHES, _PROMPTS):
            steps += _run(engine, num_sequences, num_prompt_tokens, keys, clock)
        print(f"repeat {repeat} of {num_repeats}: {len(steps)} steps", flush=True)
    return steps


def _run(
    engine: Engine,
    num_sequences: int,
    num_prompt_tokens: int,
    keys: "itertools.count[int]",
    clock: Callable[[], float],
) -> list[Row]:
    """The steps of one batch."""
    for number in range(num_sequences):
        prompt = [1 + (number * 7 + offset * 3) % 200 for offset in range(num_prompt_tokens)]
        params = SamplingParams(max_tokens=_NUM_TOKENS, seed=number, ignore_eos=True)
        engine.add(LeaseRequest(next(keys), engine.models[0].name, prompt, params))
    steps = []
    while engine.has_work():
        began = clock()
        output = engine.step()
        ms = (clock() - began) * 1000
        steps.append(Row(output.num_decoded, output.num_prefilled, ms))
    return steps


def read(path: Path, time_key: str) -> list[Row]:
    """The steps of a log; ``time_key``: "ms" or "thread_ms"."""
    steps = []
    for line in path.read_text(encoding="ascii").splitlines():
        step = json.loads(line)
        steps.append(Row(step["decoded"], step["prefilled"], step[time_key]))
    return steps


def _engine(name: str, model: str, num_threads: int) -> tuple[Engine, Callable[[], float]]:
    if name == "mock":
        return MockEngine(MockConfig(num_slots=max(_BATCHES), step_ms=5.0)), time.perf_counter
    # torch takes seconds to import, so only where it is wanted
    from executor_svc.torch_engine.config import EngineConfig
    from executor_svc.torch_engine.engine import TorchEngine

    config = EngineConfig(
        models=(("model", model),),
        max_num_seqs=max(_BATCHES),
        max_num_batched_tokens=_MAX_BATCHED_TOKENS,
        num_threads=num_threads,
        enable_prefix_caching=False,
        max_model_len=max(_PROMPTS) + _NUM_TOKENS,
    )
    return TorchEngine(config), time.process_time


def _steps(arguments: argparse.Namespace) -> list[Row]:
    time_key = "thread_ms" if arguments.thread_time else "ms"
    if arguments.log is not None:
        return read(arguments.log, time_key)
    if arguments.at_work:
        with TemporaryDirectory() as folder:
            log = Path(folder, "steps.jsonl")
            at_work.step_log(
                log,
                arguments.engine,
                arguments.model,
                num_threads=arguments.threads,
                num_requests=arguments.at_work,
            )
            return read(log, time_key)
    engine, clock = _engine(arguments.engine, arguments.model, arguments.threads)
    try:
        return drive(engine, clock, arguments.repeats)
    finally:
        engine.close()


def main(words: list[str] | None = None) -> int:
    """Print the rows and the fit."""
    parser = parser_of("bench.sim.calibrate", __doc__)
    parser.add_argument("--engine", default="mock", choices=["mock", "torch"])
    parser.add_argument("--model", default=str(BUILTIN_MODEL), help="folder, for torch")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--repeats", type=int, default=10, help="of each batch")
    parser.add_argument("--at-work", type=int, metavar="REQUESTS", help="of an executor, instead")
    parser.add_argument("--log", type=Path, help="steps of executors that ran, instead")
    parser.add_argument("--thread-time", action="store_true", help="of the engine's thread")
    parser.add_argument("--quantile", type=float, help="of repeats; 0 for torch, 0.5 for others")
    arguments = parser.parse_args(words)
    steps = _steps(arguments)
    is_driven = arguments.log is None and not arguments.at_work
    quantile = arguments.quantile
    if quantile is None:
        quantile = 0.0 if is_driven and arguments.engine == "torch" else 0.5
    rows = kinds(steps, quantile, 1 if is_driven else _LEAST_REPEATS)
    if len(rows) < 4:
        parser.error(f"{len(rows)} kinds of steps came often; 4 are needed")
    found = fit(rows)
    for row in rows:
        print(f"{row.num_decoded:3d} decoded, {row.num_prefilled:4d} prefilled: {row.ms:.2f} ms")
    figures = {name: round(getattr(found, name), 4) for name in Fit.__dataclass_fields__}
    of = arguments.engine if arguments.log is None else "log"
    about = {"bench": "calibrate", "of": of, "num_steps": len(steps), "num_kinds": len(rows)}
    print(json.dumps({**about, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
