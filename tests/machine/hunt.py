"""A search for broken promises with plain random numbers, which can go on for a night. Most runs
lose few executors, since each loss starts all promises anew.

``python -m tests.machine.hunt --first-seed 1 --runs 1000 --steps 25`` plays the rules of
BoundsMachine in scenes of its own making, ends each run with a time that is left alone, and prints
the steps of what breaks, shortened.
"""

import argparse
import random
import sys
import traceback
from collections import Counter
from typing import Any

from tests.machine.honest_executor import FOREVER_MS
from tests.machine.honest_fleet import MAX_TOKENS
from tests.machine.test_bounds_machine import BoundsMachine

_PROGRESS_RUNS = 100

# the name of a rule and what it is given
Step = tuple[str, dict[str, Any]]

_CLIENTS = ("stream", "stream", "stream", "rivals", "submit", "come_back", "cancel")
_TIME = ("let_time_pass", "leave_alone", "leave_alone", "leave_alone_for_long")
_LOSSES = ("attach", "lose", "blink", "shut_down", "drain", "resize", "fail_loads")
_RARE = ("calm_down",)


def steps(rng: random.Random, num_steps: int) -> list[Step]:
    """One run."""
    start = {
        "seed": rng.choice((0, rng.randrange(1, 1 << 32), rng.randrange(1, 1 << 32))),
        "num_slots": _number(rng),
        "max_models": rng.choice((0, 0, 1, 2)),
        "depths": [rng.randint(0, 2) for _ in range(6)],
        "has_shares": rng.random() < 0.5,
    }
    found: list[Step] = [("start", start)]
    losses = rng.random() ** 2
    for _ in range(num_steps):
        rules = _CLIENTS + _TIME + (_LOSSES if rng.random() < losses else ())
        rule = rng.choice(rules if rng.random() < 0.99 else _RARE)
        found.append((rule, _given(rng, rule)))
    return [*found, ("leave_alone_for_long", {}), ("leave_alone", {})]


def _number(rng: random.Random) -> int:
    """One of so many things."""
    return rng.randrange(16)


def _given(rng: random.Random, rule: str) -> dict[str, Any]:
    model, band, tenant, executor = (_number(rng) for _ in range(4))
    num_tokens = rng.randint(0, MAX_TOKENS)
    match rule:
        case "attach":
            return {
                "executor": executor,
                "num_slots": _number(rng),
                "max_models": _number(rng),
                "offers": {_number(rng) for _ in range(rng.randint(0, 6))},
            }
        case "lose" | "shut_down":
            return {"executor": executor}
        case "blink":
            return {"executor": executor, "away_ms": rng.choice((1, 50, 500, 2_000))}
        case "drain":
            return {"executor": executor, "is_draining": rng.random() < 0.3}
        case "resize":
            return {
                "executor": executor,
                "num_slots": _number(rng),
                "max_models": _number(rng),
            }
        case "fail_loads":
            return {"executor": executor, "num": rng.randint(1, 3)}
        case "stream":
            return {
                "tenant": tenant,
                "model": model,
                "band": band,
                "depth": rng.choice((2, 1, 3, 0)),
                "is_short": rng.random() < 0.5,
                "num_tokens": num_tokens,
                "session_id": rng.choice(("", "s")),
                "num_blocks": rng.choice((0, 0, 2)),
                "queue_timeout_ms": rng.choice((FOREVER_MS, FOREVER_MS, FOREVER_MS, 70, 700)),
                "execution_timeout_ms": rng.choice((FOREVER_MS, FOREVER_MS, FOREVER_MS, 30)),
                "num_samples": rng.choice((1, 1, 1, 2, 4)),
            }
        case "rivals":
            return {"model": model, "band": band, "num_tokens": num_tokens}
        case "submit":
            return {"tenant": tenant, "model": model, "band": band}
        case "come_back":
            return {"tenant": tenant, "model": model}
        case "cancel":
            return {"number": _number(rng)}
        case "let_time_pass":
            return {"ms": rng.choice((10, 100, 1_000))}
        case _:
            return {}


def play(run: list[Step]) -> BoundsMachine:
    """Raises AssertionError if a promise is broken."""
    machine = BoundsMachine()
    for rule, given in run:
        getattr(machine, rule)(**given)
    machine.world.core.check_invariants()
    return machine


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
    used: Counter[str] = Counter()
    for seed in range(args.first_seed, args.first_seed + args.runs):
        if (num_done := seed - args.first_seed) and not num_done % _PROGRESS_RUNS:
            print(f"{num_done} runs; {_parts(used)}", flush=True)
        run = steps(random.Random(seed), args.steps)
        try:
            used |= Counter(play(run).watch.used)
        except AssertionError:
            print(f"seed {seed} breaks a promise:")
            traceback.print_exc(limit=-2, file=sys.stdout)
            for rule, given in shortened(run):
                print(f"machine.{rule}({', '.join(f'{k}={v!r}' for k, v in given.items())})")
            return 1
    print(f"{args.runs} runs of {args.steps} steps from {args.first_seed}: every promise is kept")
    print(_parts(used))
    return 0


def _parts(used: Counter[str]) -> str:
    """How near it came."""
    return "of bounds used: " + ", ".join(f"{name} {part:.0%}" for name, part in used.items())


if __name__ == "__main__":
    sys.exit(main())
