"""Small worlds for tests."""

from collections.abc import Sequence

from bench.sim.costs import PROFILES
from bench.sim.faults import Fault
from bench.sim.journal import Journal
from bench.sim.policy import make_policy
from bench.sim.workload import Fleet, Job, model_names
from bench.sim.world import World

COSTS = PROFILES["mock"]  # 20 ms a token, prefill for nothing


def job(number: int, due_ms: int, model: str = "m0", num_output_tokens: int = 50) -> Job:
    """A request of one second."""
    return Job(number, due_ms, "t", model, 100, num_output_tokens, 2 * num_output_tokens)


def run(
    policy: str,
    jobs: Sequence[Job],
    fleet: Fleet,
    *,
    num_models: int = 2,
    faults: Sequence[Fault] = (),
) -> Journal:
    """Simulate; models are m0, m1, ..., rare."""
    models = model_names(num_models)
    return World(make_policy(policy), fleet, COSTS, models, jobs, faults).run()


def waits_s(journal: Journal, model: str) -> list[float]:
    """Arrival until work starts, of one model's requests."""
    return [
        (record.started_ms - record.job.due_ms) / 1000
        for record in journal.records.values()
        if record.job.model == model and record.started_ms is not None
    ]
