"""Runs of the same workloads under several policies.

Rule: a plan says everything about a run; a run is a pure function of its plan but for the CPU
times in its figures. Runs are spread over processes, results are put back in the plan's order.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from time import process_time

from bench.sim.costs import PROFILES
from bench.sim.faults import draw_faults
from bench.sim.metrics import RARE, Figures, measure
from bench.sim.policy import make_policy, settings_of
from bench.sim.workload import Fleet, Job, draw, model_names, with_impatience
from bench.sim.world import World

SAMPLE_MS = 5_000


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    policy: str
    load: float
    seed: int
    trace: str = "synthetic"
    seconds: int = 1_200
    num_models: int = 6
    fleet: Fleet = field(default_factory=Fleet)
    slo_s: float = 10.0
    num_faults: int = 0
    # share of the clients that hang up, after 60 s on the average
    impatient_share: float = 0.0
    # core settings that are not the product's defaults
    core: tuple[tuple[str, str], ...] = ()
    has_samples: bool = True


@lru_cache(maxsize=2)
def _jobs(
    trace: str,
    num_models: int,
    fleet: Fleet,
    load: float,
    seconds: int,
    seed: int,
    impatient: float,
) -> list[Job]:
    jobs = draw(
        trace,
        num_models=num_models,
        fleet=fleet,
        costs=PROFILES[fleet.costs_name],
        load=load,
        seconds=seconds,
        seed=seed,
    )
    return with_impatience(jobs, impatient, 60.0, seed) if impatient else jobs


def jobs_of(plan: Plan) -> list[Job]:
    """The workload of a plan: the same for every policy."""
    return _jobs(
        plan.trace,
        plan.num_models,
        plan.fleet,
        plan.load,
        plan.seconds,
        plan.seed,
        plan.impatient_share,
    )


def world_of(plan: Plan) -> World:
    """The world of a plan, not yet run."""
    fleet = plan.fleet
    return World(
        make_policy(plan.policy, dict(plan.core)),
        fleet,
        PROFILES[fleet.costs_name],
        model_names(plan.num_models),
        jobs_of(plan),
        draw_faults(plan.num_faults, fleet.num_executors, plan.seconds, plan.seed),
        sample_ms=SAMPLE_MS if plan.has_samples else None,
    )


def run_plan(plan: Plan) -> Figures:
    """Run it and measure."""
    jobs = jobs_of(plan)
    began_s = process_time()
    world = world_of(plan)
    journal = world.run()
    cpu_s = process_time() - began_s
    figures = measure(journal, jobs, plan.seconds, plan.slo_s)
    figures["cpu_s"] = cpu_s
    figures["policy_us"] = world.policy_ns / 1000 / max(1, world.num_events)
    figures["num_events"] = world.num_events
    figures["bound_s"] = starvation_bound_s(plan)
    executors = world.executors.values()
    figures["num_early_grants"] = sum(executor.num_early_grants for executor in executors)
    figures["num_refused_loads"] = sum(executor.num_refused_loads for executor in executors)
    return figures


def run_all(
    plans: list[Plan], num_processes: int, done: Callable[[Plan, Figures], None]
) -> list[Figures]:
    """All of them; ``done`` hears of each in the plans' order."""
    results: list[Figures] = []
    for plan, figures in zip(plans, _spread(plans, num_processes), strict=True):
        done(plan, figures)
        results.append(figures)
    return results


def _spread(plans: list[Plan], num_processes: int) -> Iterable[Figures]:
    if num_processes == 1:
        yield from map(run_plan, plans)
        return
    with ProcessPoolExecutor(num_processes) as pool:
        yield from pool.map(run_plan, plans)


def starvation_bound_s(plan: Plan) -> float | None:
    """Latest start of a request of the rare model under Headway (docs/scheduling.md, Bounds).

    None where nothing is promised: the references, and FIFO (warm_bonus 0).

    E + k x (D + R + L) + Q, where
    - E = aging_equalization_ms;
    - D = L / switch_time_share, the dwell after a forced switch of the chosen executor;
    - R = the longest lease, which may just have begun there;
    - L = the load;
    - k = how many models can be cold at once and rank before it, itself included, dealt out over
      the executors: ceil((models - seats for models) / executors), at least 1;
    - Q = those of the rare model before it: as many as arrive within the rest of the bound, in
      its executor's slots, each as long as the longest.
    """
    fleet, jobs = plan.fleet, jobs_of(plan)
    settings = settings_of(plan.policy, dict(plan.core))
    if settings is None or settings.is_fifo or not settings.switch_time_share:
        return None
    costs = PROFILES[fleet.costs_name]
    longest_s = (
        max(
            costs.service_ms(job.num_prompt_tokens, job.num_output_tokens, fleet.num_slots)
            for job in jobs
        )
        / 1000
    )
    load_s = fleet.load_time_ms / 1000
    num_seats = fleet.num_executors * fleet.max_models
    rounds = max(1, math.ceil((plan.num_models - num_seats) / fleet.num_executors))
    dwell_s = load_s / settings.switch_time_share
    start_s = settings.aging_equalization_ms / 1000 + rounds * (dwell_s + longest_s + load_s)
    arrivals = [job.due_ms / 1000 for job in jobs if job.model == RARE]
    ahead = max(
        (sum(at - start_s <= other < at for other in arrivals) for at in arrivals), default=0
    )
    return start_s + math.ceil(ahead / fleet.num_slots) * longest_s
