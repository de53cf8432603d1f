"""How fast the scheduler's brain decides, whatever the length of its queue.

    python -m bench.core            a minute of CPU, one core, 1,000,000 requests in memory
    python -m bench.core --compiled the same, then half a minute with the core compiled by mypyc,
                                    which takes a minute by itself the first time
    python -m bench.core --quick    a second or two, for tests

A decision is one ``Scheduler.handle`` of an event that the policies decide on: a LeaseEnded (who is
next, and where: it is followed by a grant) or a Submit (accept or refuse, and at which place). They
come in pairs, so that the queue keeps its length: a request costs one of each, and
``grants_per_s`` is of the pair. Model loads that the core orders meanwhile, and Ticks that fall
due, are answered at once and their time counts in the decision that they came with.

The fleet is full all the time: 1,000 executors of 8 slots, each with 4 of its 8 models on the
device; 32 models, 200 tenants, 4 bands, half of the requests in sessions, half with a known
prefix. The garbage collector is scheduled as in the process (headway.collector), from before
the first executor attaches; ``fill_max_ms`` is the longest Submit while the queue grows.

Beside it, in the same run, the method of llamacpp-ha 0.14, re-modelled in few lines
(bench.core.reference): every cycle gives each waiting entry a priority, sorts them all, and tries
to place one after another. One release, one arrival and one cycle for both are compared with a
pair of ours. It runs with 64 backends instead of 1,000, which
flatters it: its cost grows with both.

Times are CPU time of this thread, so that neighbours on the machine do not count, but for the
caches that they take; the collector, which runs in this thread, does. ``wall_decisions_per_s`` is
by the clock on the wall, the making of the requests included.

The last line is JSON: decisions_per_s, grants_per_s, p50_us, p99_us and max_ms at 100,000 queued;
mean_ratio_1m_to_1k (of the longest queue to the shortest); reference_ratio (its mean to that of our
pairs, at the longest queue that both ran). With --compiled also compiled_decisions_per_s,
compiled_p50_us, compiled_p99_us and compiled_max_ms, and all figures of that run as ``compiled``.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from typing import Any

from bench.arguments import parser_of
from bench.core.compiled import measure_compiled
from bench.core.load import FULL, PAIRS_PER_MS, QUICK, Brain, Scale
from bench.core.reference import measure_reference
from bench.figures import percentile
from hatch_build import compiled_core
from headway.collector import scheduled
from scheduler_svc.core import scheduler
from scheduler_svc.settings import SchedulerSettings


class Pauses:
    """How long the garbage collector stops everything, while it is watched."""

    def __init__(self) -> None:
        self.longest_ns = 0
        self._since_ns = 0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, _: dict[str, int]) -> None:
        now_ns = time.thread_time_ns()
        if phase == "start":
            self._since_ns = now_ns
        else:
            self.longest_ns = max(self.longest_ns, now_ns - self._since_ns)

    def close(self) -> None:
        """Stop watching."""
        gc.callbacks.remove(self._note)


def measure(scale: Scale, num_queued: int) -> dict[str, float]:
    """Fill a fresh core up to a queue length, then make decisions and time each one."""
    print(f"Headway, {num_queued:,} queued:", flush=True)
    settings = SchedulerSettings()
    with scheduled(settings.collect_young_objects, settings.collect_young_rounds):
        brain = Brain(scale, num_queued)
        brain.attach_all()
        started = time.perf_counter()
        fill_max_ms = brain.fill(num_queued)
        fill_s = time.perf_counter() - started
        return decide(brain, scale, num_queued) | {
            "fill_s": round(fill_s, 2),
            "fill_max_ms": round(fill_max_ms, 2),
        }


def decide(brain: Brain, scale: Scale, num_queued: int) -> dict[str, float]:
    """Make pairs of decisions, and figures of them."""
    ends, arrivals = [], []
    num_warm_up = scale.num_pairs // 20
    pauses = Pauses()
    started = time.perf_counter()
    for number in range(scale.num_pairs + num_warm_up):
        if number % PAIRS_PER_MS == 0:
            brain.now_ms += 1
        if number == num_warm_up:
            brain.counts.clear()
        end_ns, arrival_ns = brain.decide()
        if number >= num_warm_up:
            ends.append(end_ns)
            arrivals.append(arrival_ns)
    wall_s = time.perf_counter() - started
    pauses.close()
    both = ends + arrivals
    mean_us = statistics.fmean(both) / 1e3
    found = {
        "num_queued": num_queued,
        "num_queued_at_end": brain.core.num_waiting,
        "decisions_per_s": round(1e6 / mean_us),
        "grants_per_s": round(1e6 / (2 * mean_us)),
        "wall_decisions_per_s": round(2 * (scale.num_pairs + num_warm_up) / wall_s),
        "mean_us": round(mean_us, 2),
        "p50_us": percentile_us(both, 0.5),
        "p99_us": percentile_us(both, 0.99),
        "max_ms": round(max(both) / 1e6, 3),
        "collector_max_ms": round(pauses.longest_ns / 1e6, 3),
        "end_and_grant_mean_us": round(statistics.fmean(ends) / 1e3, 2),
        "end_and_grant_p99_us": percentile_us(ends, 0.99),
        "submit_mean_us": round(statistics.fmean(arrivals) / 1e3, 2),
        "submit_p99_us": percentile_us(arrivals, 0.99),
        "grants_per_end": round(brain.counts["grants"] / scale.num_pairs, 3),
        "loads_per_1000": round(1e3 * brain.counts["loads"] / scale.num_pairs, 2),
    }
    print(
        f"    {found['decisions_per_s']:,} decisions/s, {found['grants_per_s']:,} grants/s, p50 "
        f"{found['p50_us']} us, p99 {found['p99_us']} us, longest {found['max_ms']} ms",
        flush=True,
    )
    return found


def percentile_us(nanoseconds: list[int], share: float) -> float:
    """In microseconds."""
    return round(percentile(sorted(nanoseconds), share) / 1e3, 2)


def run(scale: Scale) -> dict[str, Any]:
    """All measurements, as the last line shows them."""
    ours = {num_queued: measure(scale, num_queued) for num_queued in scale.queues}
    theirs = {
        num_queued: measure_reference(scale, num_queued) for num_queued in scale.reference_queues
    }
    shown = ours[scale.shown]
    shared = max(theirs)
    mean_ratio = ours[max(ours)]["mean_us"] / ours[min(ours)]["mean_us"]
    return {
        "bench": "core",
        "decisions_per_s": shown["decisions_per_s"],
        "grants_per_s": shown["grants_per_s"],
        "p50_us": shown["p50_us"],
        "p99_us": shown["p99_us"],
        "max_ms": shown["max_ms"],
        "mean_ratio_1m_to_1k": round(mean_ratio, 2),
        "reference_ratio": round(theirs[shared]["mean_us"] / (2 * ours[shared]["mean_us"]), 1),
        "shown_at": scale.shown,
        "reference_ratio_at": shared,
        "num_executors": scale.num_executors,
        "num_models": scale.num_models,
        "num_tenants": scale.num_tenants,
        "num_pairs": scale.num_pairs,
        "python": platform.python_version(),
        "is_compiled": not str(scheduler.__file__).endswith(".py"),
        "headway": list(ours.values()),
        "reference": list(theirs.values()),
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of("bench.core", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean little")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, help="measure the compiled core too"
    )
    arguments = parser.parse_args()
    # first, since it may take a minute or find no compiler
    folder = compiled_core() if arguments.compiled else None
    figures = run(QUICK if arguments.quick else FULL)
    if folder is not None:
        figures |= measure_compiled(folder, arguments.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
