"""Whole runs, with the product's core and with the references."""

from collections import Counter
from dataclasses import replace

import pytest

from bench.sim.compare import Plan, run_plan, starvation_bound_s, world_of
from bench.sim.faults import KINDS, Fault, draw_faults
from bench.sim.journal import UNEXPLAINED
from bench.sim.policy import POLICIES, core_settings, make_policy
from bench.sim.workload import Fleet, draw, model_names
from bench.sim.world import World
from tests.sim.helpers import COSTS, job, run, waits_s

SMALL = Plan("headway", load=0.8, seed=3, seconds=120)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ["slot", "fluid", "step"])
def test_every_request_ends_once_and_well(policy: str, engine: str) -> None:
    plan = replace(SMALL, policy=policy, fleet=Fleet(engine=engine))
    # more leases than slots, more models than max_models or a second end stop the run
    figures = run_plan(plan)
    assert figures["outcomes"] == {"OK": figures["num_jobs"]}
    assert figures["num_unfinished"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_plan_gives_the_same_log(policy: str) -> None:
    plan = replace(SMALL, policy=policy)
    first, again = run_plan(plan), run_plan(plan)
    assert first["log_hash"] == again["log_hash"]
    assert first["log_hash"] != run_plan(replace(plan, seed=4))["log_hash"]


def test_all_policies_get_the_same_work() -> None:
    plans = [replace(SMALL, policy=policy) for policy in POLICIES]
    worlds = [world_of(plan) for plan in plans]
    jobs = [[record.job for record in world.journal.records.values()] for world in worlds]
    assert jobs.count(jobs[0]) == len(jobs)


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_leaves_a_request_behind(kind: str) -> None:
    plan = replace(SMALL, load=0.6)
    jobs = [record.job for record in world_of(plan).journal.records.values()]
    faults = [Fault(kind, number % 4, 10_000 * number, 7_000) for number in range(1, 9)]
    fleet = Fleet()
    world = World(make_policy("headway"), fleet, COSTS, model_names(6), jobs, faults)
    journal = world.run()
    assert journal.num_open == 0
    assert journal.counts[f"fault.{kind}"] > 4
    outcomes = Counter(record.outcome for record in journal.records.values())
    assert set(outcomes) <= {"OK", "ATTEMPTS_EXHAUSTED"}
    assert outcomes["OK"] > 0.95 * len(jobs)


@pytest.mark.parametrize("seed", range(5))
def test_all_faults_together_leave_no_request_behind(seed: int) -> None:
    plan = replace(SMALL, seed=seed, num_faults=30, impatient_share=0.3)
    figures = run_plan(plan)
    assert figures["num_unfinished"] == 0
    assert set(figures["outcomes"]) <= {"OK", "CANCELLED", "ATTEMPTS_EXHAUSTED"}
    assert figures["outcomes"]["CANCELLED"] > 0


def test_the_core_grants_only_what_is_resident_and_orders_no_impossible_load() -> None:
    figures = run_plan(SMALL)
    assert figures["num_early_grants"] == 0
    assert figures["num_refused_loads"] == 0


def test_w1_llamacpp_ha_starves_a_cold_model_on_its_only_home_and_headway_does_not() -> None:
    fleet = Fleet(num_executors=1, num_slots=2)
    stream = [job(number, 400 * number) for number in range(1_500)]  # 125 % of two slots
    jobs = sorted([*stream, job(9_999, 5_000, "rare")], key=lambda job: job.due_ms)
    last_start_s = stream[-1].due_ms / 1000
    (starved,) = waits_s(run("llamacpp-ha", jobs, fleet), "rare")
    assert starved > last_start_s - 5
    (served,) = waits_s(run("headway", jobs, fleet), "rare")
    settings = core_settings({})
    e_s, load_s = settings.aging_equalization_ms / 1000, fleet.load_time_ms / 1000
    assert served <= e_s + load_s / settings.switch_time_share + load_s + 2


def test_w6_draining_at_once_for_every_cold_model_costs_far_more_than_it_gains() -> None:
    plan = Plan("llamacpp-ha", load=0.6, seed=1, seconds=600, has_samples=False)
    eager = run_plan(plan)["mean_wait_s"]
    assert eager > 2 * run_plan(replace(plan, policy="resident-first"))["mean_wait_s"]


def test_the_rare_model_starts_within_the_bound() -> None:
    plan = Plan("headway", load=0.6, seed=1, seconds=600, has_samples=False)
    bound_s = starvation_bound_s(plan)
    assert bound_s is not None
    assert run_plan(plan)["rare_max_wait_s"] <= bound_s


def test_a_load_is_what_the_jobs_ask_for() -> None:
    fleet = Fleet()
    jobs = draw(
        "synthetic", num_models=6, fleet=fleet, costs=COSTS, load=0.6, seconds=3_600, seed=1
    )
    work_ms = sum(COSTS.service_ms(j.num_prompt_tokens, j.num_output_tokens, 4) for j in jobs)
    assert work_ms / (fleet.num_fleet_slots * 3_600_000) == pytest.approx(0.6, rel=0.05)
    share = sum(job.model == "rare" for job in jobs) / len(jobs)
    assert share == pytest.approx(0.01, abs=0.005)


def test_faults_are_drawn_from_the_seed() -> None:
    assert draw_faults(8, 4, 60, 1) == draw_faults(8, 4, 60, 1) != draw_faults(8, 4, 60, 2)


def test_the_mean_wait_is_no_worse_than_that_of_policies_that_never_drain() -> None:
    """Means of two seeds, whose noise is about a tenth."""
    waits_s: Counter[str] = Counter()
    for seed in (1, 2):
        plan = Plan("headway", load=0.6, seed=seed, seconds=900, has_samples=False)
        for policy in ("headway", "fifo", "resident-first"):
            waits_s[policy] += run_plan(replace(plan, policy=policy))["mean_wait_s"]
    assert waits_s["headway"] <= 1.2 * min(waits_s["fifo"], waits_s["resident-first"])


def test_a_hog_takes_the_fleet_in_order_of_arrival_and_not_under_headway() -> None:
    plan = Plan("headway", 10.0, 1, trace="hog", seconds=300, has_samples=False)
    headway, fifo = run_plan(plan), run_plan(replace(plan, policy="fifo"))
    assert fifo["worst_share"] < 0.15
    assert headway["worst_share"] > 4 * fifo["worst_share"]
    assert headway["jain"] > 0.8


@pytest.mark.parametrize("load", [0.6, 1.1])
def test_every_position_that_rose_has_a_cause_in_the_decision_log(load: float) -> None:
    figures = run_plan(replace(SMALL, load=load, seconds=400))
    assert sum(figures["rises"].values()) > 0
    assert UNEXPLAINED not in figures["rises"]


def test_estimates_are_mostly_right_within_a_factor_of_two() -> None:
    found = run_plan(replace(SMALL, load=0.6, seconds=900))["eta"]
    assert found["p90_relative_error"] < 2.0
    assert found["share_within_25_percent"] > 0.25
