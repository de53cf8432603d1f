"""The big run: what the core costs at a thousand executors and two hundred thousand requests."""

from collections.abc import Callable
from time import perf_counter, process_time

from bench.sim.compare import Plan, jobs_of, world_of
from bench.sim.metrics import Figures
from bench.sim.workload import Fleet

NUM_REQUESTS = 200_000
_FLEET = Fleet(num_executors=1_000, num_slots=4, max_models=1)


def scale_plan(policy: str, load: float, seed: int, num_requests: int) -> Plan:
    """So long a window that about ``num_requests`` arrive; 32 models."""
    probe = Plan(policy, load, seed, seconds=10, num_models=32, fleet=_FLEET, has_samples=False)
    rate = len(jobs_of(probe)) / probe.seconds
    return Plan(
        policy,
        load,
        seed,
        seconds=round(num_requests / rate),
        num_models=32,
        fleet=_FLEET,
        has_samples=False,
    )


def run_scale(plan: Plan, say: Callable[[str], None]) -> Figures:
    """Run it; gives CPU seconds in all and in the policy, and microseconds for each event."""
    began_s = process_time()
    jobs = jobs_of(plan)
    drawn_s = process_time() - began_s
    say(f"{len(jobs)} requests in {plan.seconds} s for 1000 executors, drawn in {drawn_s:.1f} s")
    began_s, clock_s = process_time(), perf_counter()
    world = world_of(plan)
    journal = world.run()
    cpu_s = process_time() - began_s
    # the policy's time was taken by the clock, which goes on while others have the processor
    policy_s = world.policy_ns / 1e9 * cpu_s / (perf_counter() - clock_s)
    return {
        "num_requests": len(jobs),
        "num_unfinished": journal.num_open,
        "num_events": world.num_events,
        "cpu_s": round(cpu_s, 1),
        "policy_s": round(policy_s, 1),
        "policy_us_per_event": round(policy_s * 1e6 / world.num_events, 1),
        "simulator_us_per_event": round((cpu_s - policy_s) * 1e6 / world.num_events, 1),
        "simulated_s": world.now_ms / 1000,
        "log_hash": journal.log_hash,
    }
