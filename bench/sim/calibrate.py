"""``python -m bench.sim.calibrate``: the constants of costs.py from steps of a real engine.

An engine is driven in this process: n sequences with prompts of p tokens start together, so the
first step is all prefill and every later one decodes n sequences. Of each (n, p) the median time
of a step is one row. The rows are fitted by non-negative least squares, on the relative error, to

    step time = step_ms + sequence_ms x n + prefill_ms x prefill tokens        (milliseconds)

Every second row is left out of the fit, and the error is stated on those. A mock engine sleeps, so
it is timed by the wall; torch on a CPU by the process's CPU time, with one thread. Ends with one
line of JSON.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from executor_svc.core.engine import Engine, LeaseRequest, SamplingParams
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.settings import BUILTIN_MODEL

_BATCHES = (1, 2, 3, 4, 6, 8)
# n x p stays within the tokens of one step, so that a prompt is prefilled in one
_PROMPTS = (4, 8, 16, 32, 48, 64)
_NUM_TOKENS = 24
_MAX_BATCHED_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Row:
    """The median time of one kind of step."""

    num_sequences: int
    num_prefill_tokens: int
    ms: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The constants, and how far they were off on rows that were not fitted."""

    step_ms: float
    sequence_ms: float
    prefill_ms: float
    mean_relative_error: float
    max_relative_error: float


def fit(rows: list[Row]) -> Fit:
    """Fit every second row, judge by the others; needs at least four rows."""
    constants = non_negative_least_squares(_matrix(rows[::2]), np.ones(len(rows[::2])))
    errors = np.abs(_matrix(rows[1::2]) @ constants - 1)
    step_ms, sequence_ms, prefill_ms = map(float, constants)
    return Fit(step_ms, sequence_ms, prefill_ms, float(errors.mean()), float(errors.max()))


def _matrix(rows: list[Row]) -> np.ndarray:
    """[rows, 3]; divided by the time, so that the right-hand side is 1 and errors are relative."""
    counts = [[1, row.num_sequences, row.num_prefill_tokens] for row in rows]
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


def step_log(engine: Engine, clock: Callable[[], float]) -> list[Row]:
    """Drive an engine through all kinds of steps; its first model, which must be resident."""
    keys = itertools.count(1, 16)
    _run(engine, 2, 8, keys, clock)  # first steps load code and memory
    rows = []
    for num_sequences in _BATCHES:
        decode_ms = []
        for num_prompt_tokens in _PROMPTS:
            first_ms, later_ms = _run(engine, num_sequences, num_prompt_tokens, keys, clock)
            rows.append(Row(num_sequences, num_sequences * num_prompt_tokens, first_ms))
            decode_ms += later_ms
        rows.append(Row(num_sequences, 0, statistics.median(decode_ms)))
    return rows


def _run(
    engine: Engine,
    num_sequences: int,
    num_prompt_tokens: int,
    keys: "itertools.count[int]",
    clock: Callable[[], float],
) -> tuple[float, list[float]]:
    """The median time of a prefill step of three, and the times of all decode steps."""
    firsts, laters = [], []
    for repeat in range(3):
        for number in range(num_sequences):
            # no two prompts share a prefix that a cache could serve
            start = 1 + (repeat * num_sequences + number) * 7
            prompt = [start + offset * 3 % 200 for offset in range(num_prompt_tokens)]
            params = SamplingParams(max_tokens=_NUM_TOKENS, seed=number, ignore_eos=True)
            engine.add(LeaseRequest(next(keys), engine.models[0].name, prompt, params))
        times = []
        while engine.has_work():
            began = clock()
            engine.step()
            times.append((clock() - began) * 1000)
        firsts.append(times[0])
        laters += times[1:-1]
    return statistics.median(firsts), laters


def _engine(name: str) -> tuple[Engine, Callable[[], float]]:
    if name == "mock":
        return MockEngine(MockConfig(num_slots=max(_BATCHES), step_ms=5.0)), time.perf_counter
    # torch takes seconds to import, so only where it is wanted
    from executor_svc.torch_engine.config import EngineConfig
    from executor_svc.torch_engine.engine import TorchEngine

    config = EngineConfig(
        models=(("builtin", str(BUILTIN_MODEL)),),
        max_num_seqs=max(_BATCHES),
        max_num_batched_tokens=_MAX_BATCHED_TOKENS,
        num_threads=1,
    )
    return TorchEngine(config), time.process_time


def main(words: list[str] | None = None) -> int:
    """Print the rows and the fit."""
    parser = argparse.ArgumentParser(prog="python -m bench.sim.calibrate", description=__doc__)
    parser.add_argument("--engine", default="mock", choices=["mock", "torch"])
    arguments = parser.parse_args(words)
    engine, clock = _engine(arguments.engine)
    try:
        rows = step_log(engine, clock)
    finally:
        engine.close()
    found = fit(rows)
    for row in rows:
        print(f"n {row.num_sequences}, prefill {row.num_prefill_tokens:3d}: {row.ms:.2f} ms")
    figures = {name: round(getattr(found, name), 4) for name in Fit.__dataclass_fields__}
    print(json.dumps({"bench": "calibrate", "engine": arguments.engine, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
