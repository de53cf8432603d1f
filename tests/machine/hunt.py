"""A search for broken bounds on waiting with plain random numbers, which can go on for a night.
Most runs lose few executors, since each loss starts all promises anew.

``python -m tests.machine.hunt --first-seed 1 --runs 1000 --steps 25`` plays the rules of
BoundsMachine, ends each run with a time that is left alone, and prints the steps of what breaks,
shortened.
"""

import argparse
import random
import sys
import traceback
from typing import Any

from tests.machine.honest_fleet import FOREVER_MS, MAX_TOKENS
from tests.machine.test_bounds_machine import (
    FLOW_MS,
    LEASE_MS,
    MODEL_MS,
    MODELS,
    MOST_SLOTS,
    NUM_BANDS,
    TENANTS,
    BoundsMachine,
)

_PROGRESS_RUNS = 100

# the name of a rule and what it is given
Step = tuple[str, dict[str, Any]]

_CLIENTS = ("stream", "stream", "stream", "rivals", "submit", "come_back", "cancel")
_TIME = ("let_time_pass", "leave_alone", "leave_alone")
_LOSSES = ("attach", "lose_one", "drain", "fail_loads")


def steps(rng: random.Random, num_steps: int) -> list[Step]:
    """One run."""
    depths = tuple(rng.randint(0, 2) for _ in MODELS)
    start = {
        "num_slots": rng.randint(1, MOST_SLOTS),
        "max_models": rng.choice((1, 1, 2)),
        "depths": depths,
        "has_shares": rng.random() < 0.5,
    }
    found: list[Step] = [("start", start)]
    losses = rng.random() ** 2
    for _ in range(num_steps):
        rules = _CLIENTS + _TIME + (_LOSSES if rng.random() < losses else ())
        rule = rng.choice(rules)
        found.append((rule, _given(rng, rule)))
    calm = [("leave_alone", {"ms": ms}) for ms in (2 * MODEL_MS, FLOW_MS + MODEL_MS)]
    return [*found, *calm]


def _given(rng: random.Random, rule: str) -> dict[str, Any]:
    model, band = rng.choice(MODELS), rng.randrange(NUM_BANDS)
    tenant, executor = rng.choice(TENANTS), rng.choice(("e0", "e1"))
    num_tokens = rng.randint(0, MAX_TOKENS)
    match rule:
        case "attach":
            return {
                "name": executor,
                "num_slots": rng.randint(1, MOST_SLOTS),
                "max_models": rng.randint(1, 2),
                "offers": set(rng.sample(MODELS, rng.randint(2, len(MODELS)))),
            }
        case "drain":
            return {"name": executor, "is_draining": rng.random() < 0.3}
        case "fail_loads":
            return {"name": executor, "num": rng.randint(1, 3)}
        case "stream":
            return {
                "tenant": tenant,
                "model": model,
                "band": band,
                "depth": rng.choice((2, 1, 3, 0)),
                "lease_ms": rng.choice((LEASE_MS, 50)),
                "num_tokens": num_tokens,
                "session_id": rng.choice(("", "s")),
                "queue_timeout_ms": rng.choice((FOREVER_MS, FOREVER_MS, 70)),
                "num_samples": rng.choice((1, 1, MOST_SLOTS)),
            }
        case "rivals":
            return {"model": model, "band": band, "num_tokens": num_tokens}
        case "submit":
            return {"tenant": tenant, "model": model, "band": band}
        case "come_back":
            return {"tenant": rng.choice(TENANTS[1:]), "model": model}
        case "cancel":
            return {"number": rng.randint(0, 15)}
        case "let_time_pass":
            return {"ms": rng.choice((10, 100, 1_000))}
        case "leave_alone":
            return {"ms": rng.choice((2 * MODEL_MS, 2 * MODEL_MS, FLOW_MS + MODEL_MS))}
        case _:
            return {}


def play(run: list[Step]) -> None:
    """Raises AssertionError if a promise is broken."""
    machine = BoundsMachine()
    for rule, given in run:
        getattr(machine, rule)(**given)


def breaks(run: list[Step]) -> bool:
    """Whether a promise is broken."""
    try:
        play(run)
    except AssertionError:
        return True
    return False


def shortened(run: list[Step]) -> list[Step]:
    """What is left of a run that breaks when no single step can be spared."""
    at = len(run) - 1
    while at > 0:
        shorter = run[:at] + run[at + 1 :]
        if breaks(shorter):
            run = shorter
        at -= 1
    return run


def main() -> int:
    """How many runs broke a promise, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.machine.hunt", description=__doc__)
    parser.add_argument("--first-seed", type=int, default=1, help="of the runs, which count up")
    parser.add_argument("--runs", type=int, default=1_000, help="how many")
    parser.add_argument("--steps", type=int, default=25, help="of each run")
    args = parser.parse_args()
    for seed in range(args.first_seed, args.first_seed + args.runs):
        if (num_done := seed - args.first_seed) and not num_done % _PROGRESS_RUNS:
            print(f"{num_done} runs", flush=True)
        run = steps(random.Random(seed), args.steps)
        try:
            play(run)
        except AssertionError:
            print(f"seed {seed} breaks a promise:")
            traceback.print_exc(limit=-2, file=sys.stdout)
            for rule, given in shortened(run):
                print(f"machine.{rule}({', '.join(f'{k}={v!r}' for k, v in given.items())})")
            return 1
    print(f"{args.runs} runs of {args.steps} steps from {args.first_seed}: every promise is kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
