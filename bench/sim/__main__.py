"""``python -m bench.sim``: policies side by side on the same workloads; see docs/simulation.md."""

import argparse
import json
import sys
from pathlib import Path

from bench.arguments import parser_of
from bench.sim import scale
from bench.sim.compare import Plan, run_all
from bench.sim.costs import PROFILES
from bench.sim.engines import ENGINES
from bench.sim.metrics import Figures, together
from bench.sim.picture import page
from bench.sim.policy import POLICIES, core_settings
from bench.sim.report import last_line, table
from bench.sim.traces import FILES, is_there
from bench.sim.workload import SYNTHETIC, Fleet

QUICK = {"seeds": 2, "seconds": 300, "load": "60,110"}


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = parser_of("bench.sim", __doc__)
    add = parser.add_argument
    add("--trace", default="synthetic", choices=[*SYNTHETIC, *FILES])
    add("--executors", type=int, default=4)
    add("--slots", type=int, default=4, help="of each executor")
    add("--models", type=int, default=6, help="the last one is rare")
    add("--max-models", type=int, default=1, help="on an executor at once")
    add("--load", default="30,60,80,110", help="percent of the fleet's slot time")
    add("--load-time-s", type=float, default=8.0, help="to load a model")
    add("--engine", default="slot", choices=list(ENGINES))
    add("--costs", default="mock", choices=list(PROFILES))
    add("--seeds", type=int, default=5, help="1 to N")
    add("--seed", type=int, help="this one only")
    add("--policies", default=",".join(POLICIES), help="headway:key=value;... changes settings")
    add("--core", default="", help="core settings for every headway: key=value,...")
    add("--seconds", type=int, default=1_200, help="length of the arrivals")
    add("--slo-s", type=float, default=10.0, help="first token, from arrival")
    add("--faults", type=int, default=0, help="crashes, stalls, slow and broken wires in a run")
    add("--impatient", type=float, default=0.0, help="share of clients that hang up")
    add("--processes", type=int, default=2)
    add("--out", type=Path, default=Path("runs/sim.html"))
    add("--quick", action="store_true", help=f"small: {QUICK}")
    add("--scale", action="store_true", help="1,000 executors x 200,000 requests, first policy")
    add("--requests", type=int, default=scale.NUM_REQUESTS, help="with --scale")
    arguments = parser.parse_args(words)
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


def main(words: list[str] | None = None) -> int:
    """0 if every request ended in every run, else 1."""
    arguments = _arguments(words)
    if arguments.trace in FILES and not is_there(arguments.trace):
        print(f"{FILES[arguments.trace]} is not beside this checkout (shared/traces): skipped.")
        return 0
    if arguments.scale:
        return _scale(arguments)
    return _compare(arguments)


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    changes = {name: value for name, _, value in pairs}
    core_settings(changes)  # says what is wrong before anything runs
    return tuple(changes.items())


def _seeds(arguments: argparse.Namespace) -> list[int]:
    if arguments.seed is not None:
        return [arguments.seed]
    return list(range(1, arguments.seeds + 1))


def _plans(arguments: argparse.Namespace) -> list[Plan]:
    fleet = Fleet(
        num_executors=arguments.executors,
        num_slots=arguments.slots,
        max_models=arguments.max_models,
        load_time_ms=round(arguments.load_time_s * 1000),
        costs_name=arguments.costs,
        engine=arguments.engine,
    )
    return [
        Plan(
            policy=policy,
            load=int(load) / 100,
            seed=seed,
            trace=arguments.trace,
            seconds=arguments.seconds,
            num_models=arguments.models,
            fleet=fleet,
            slo_s=arguments.slo_s,
            num_faults=arguments.faults,
            impatient_share=arguments.impatient,
            core=_pairs(arguments.core),
        )
        for load in arguments.load.split(",")
        for seed in _seeds(arguments)
        for policy in arguments.policies.split(",")
    ]


def _compare(arguments: argparse.Namespace) -> int:
    plans = _plans(arguments)
    num_done = 0

    def done(plan: Plan, figures: Figures) -> None:
        nonlocal num_done
        num_done += 1
        print(
            f"[{num_done}/{len(plans)}] load {plan.load:.0%} seed {plan.seed} {plan.policy}: "
            f"{figures['num_jobs']} requests, mean wait {figures['mean_wait_s']:.1f} s, "
            f"{figures['cpu_s']:.1f} s of CPU",
            flush=True,
        )

    results = run_all(plans, arguments.processes, done)
    runs: dict[int, dict[str, list[Figures]]] = {}
    for plan, figures in zip(plans, results, strict=True):
        by_policy = runs.setdefault(round(plan.load * 100), {})
        by_policy.setdefault(plan.policy, []).append(figures)
    rows = {
        load: {policy: together(figures) for policy, figures in of_load.items()}
        for load, of_load in runs.items()
    }
    for load, row in rows.items():
        print(f"\n{table(load, row)}")
    about = _about(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page(rows, about), encoding="utf-8")
    print(f"\npicture: {arguments.out}")
    print(last_line(rows, about))
    return 1 if any(figures["num_unfinished"] for figures in results) else 0


def _about(arguments: argparse.Namespace) -> dict[str, str | int | float]:
    names = [
        *("trace", "executors", "slots", "models", "max_models", "load_time_s", "engine"),
        *("costs", "seconds", "slo_s", "faults", "impatient", "core"),
    ]
    seeds = ",".join(map(str, _seeds(arguments)))
    return {name: getattr(arguments, name) for name in names} | {"seeds": seeds}


def _scale(arguments: argparse.Namespace) -> int:
    policy = arguments.policies.split(",")[0]
    load = int(arguments.load.split(",")[0]) / 100
    plan = scale.scale_plan(policy, load, arguments.seed or 1, arguments.requests)
    figures = scale.run_scale(plan, print)
    print(json.dumps({"bench": "scale", "policy": policy, "load": load, **figures}))
    return 1 if figures["num_unfinished"] else 0


if __name__ == "__main__":
    sys.exit(main())
