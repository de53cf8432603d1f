"""How fast the scheduler's brain decides, whatever the length of its queue.

    python -m bench.core            about two minutes, one core, 1,000,000 requests in memory
    python -m bench.core --quick    a second or two, for tests

A decision is one request's passage through ``Scheduler.handle``: one LeaseEnded with the grant
that follows it, and one Submit that takes the granted one's place in the queue, so that the queue
keeps its length. Model loads that the core orders meanwhile, and Ticks that fall due, are answered
at once and their time counts in the decision that they came with.

The fleet is full all the time: 1,000 executors of 8 slots, each with 4 of its 8 models on the
device; 32 models, 200 tenants, 4 bands, half of the requests in sessions, half with a known
prefix. As in scheduler_svc.__main__ everything that exists is collected and frozen once, here
after the queue was filled; then the collector runs on its own. What it does before that shows in
``fill_max_ms``, the longest Submit while the queue grows.

Beside it, in the same run, the method of llamacpp-ha as shared/spec/scheduling.md part A, 6
describes it, re-modelled in few lines: every cycle gives each waiting entry a priority, sorts them
all, and tries to place one after another. Its decision is one release, one arrival and one cycle
for both. It runs with 64 backends instead of 1,000, which flatters it: its cost grows with both.

Times are CPU time of this thread, so that neighbours on the machine do not count; the collector,
which runs in this thread, does. ``wall_decisions_per_s`` is by the clock on the wall, the making
of the requests included.

The last line is JSON: decisions_per_s, p50_us, p99_us and max_ms at 100,000 queued;
mean_ratio_1m_to_1k (of the longest queue to the shortest); reference_ratio (its mean to ours, at
the longest queue that both ran).
"""

import argparse
import gc
import json
import platform
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.core.messages import (
    Effects,
    Event,
    ExecutorAttached,
    LeaseEnded,
    LeaseGranted,
    LeaseOutcome,
    ModelChanged,
    ModelLoadOrdered,
    ModelOffer,
    ModelState,
    Request,
    RequestFinished,
    RequestRejected,
    Submit,
    Tick,
)
from scheduler_svc.core.scheduler import Scheduler

EPOCH = 1
DAY_MS = 86_400_000
DECISIONS_PER_MS = 20  # how fast the modelled clock runs
NUM_OFFERED, NUM_RESIDENT = 8, 4
OUTPUT_TOKENS = (64, 128, 256, 512, 1_024)

NUM_SESSIONS = 20_000
NUM_PREFIXES = 2_000
PREFIX_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a run is."""

    queues: tuple[int, ...]
    reference_queues: tuple[int, ...]
    # where the figures of the last line are taken
    shown: int
    num_executors: int
    num_decisions: int
    num_reference_decisions: int
    num_models: int = 32
    num_tenants: int = 200
    num_slots: int = 8
    num_reference_backends: int = 64


FULL = Scale((1_000, 10_000, 100_000, 1_000_000), (1_000, 10_000), 100_000, 1_000, 20_000, 40)
QUICK = Scale((100, 1_000), (100,), 1_000, 20, 500, 5)


# --- Headway --------------------------------------------------------------------------------


class Traffic:
    """An endless supply of requests; those of one seed are always the same."""

    def __init__(self, scale: Scale, seed: int) -> None:
        self._random = random.Random(seed)
        self._models = [f"model-{number}" for number in range(scale.num_models)]
        self._tenants = [f"tenant-{number}" for number in range(scale.num_tenants)]
        self._sessions = [f"session-{number}" for number in range(NUM_SESSIONS)]
        self._prefixes = [
            tuple(self._random.getrandbits(60) for _ in range(PREFIX_BLOCKS))
            for _ in range(NUM_PREFIXES)
        ]
        self._num_requests = 0
        self._template = Request(
            request_id="",
            tenant="",
            model="",
            band=1,
            num_prompt_tokens=0,
            max_tokens=0,
            num_samples=1,
            num_bytes=10_000,
            queue_timeout_ms=30 * DAY_MS,
            execution_timeout_ms=DAY_MS,
        )

    def request(self) -> Request:
        """The next one."""
        draw = self._random
        self._num_requests += 1
        return replace(
            self._template,
            request_id=f"r{self._num_requests}",
            tenant=draw.choice(self._tenants),
            model=draw.choice(self._models),
            band=draw.choice((0, 1, 1, 1, 2, 3)),
            num_prompt_tokens=draw.randrange(50, 4_000),
            max_tokens=draw.choice(OUTPUT_TOKENS),
            session_id=draw.choice(self._sessions) if draw.random() < 0.5 else "",
            prefix_hashes=draw.choice(self._prefixes) if draw.random() < 0.5 else (),
        )


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


class Brain:
    """The core under load: a clock, a full fleet, and the leases that run."""

    def __init__(self, scale: Scale, num_queued: int) -> None:
        self._scale = scale
        most = num_queued + scale.num_executors * scale.num_slots + 10_000
        settings = CoreSettings(
            max_queued_requests=most,
            max_queued_tokens=1 << 60,
            max_queued_bytes=1 << 60,
            max_inflight=most,
            max_inflight_per_tenant=most,
            max_inflight_per_model=most,
        )
        self.core = Scheduler(settings, EPOCH)
        self._random = random.Random(1)
        self.traffic = Traffic(scale, seed=2)
        self.now_ms = 1_000
        self._running: list[LeaseGranted] = []
        self.counts: Counter[str] = Counter()

    def attach_all(self) -> None:
        """The fleet; every model is on several devices from the start."""
        for number in range(self._scale.num_executors):
            names = [
                f"model-{(number * NUM_RESIDENT + offset) % self._scale.num_models}"
                for offset in range(NUM_OFFERED)
            ]
            models = tuple(
                ModelOffer(name, is_resident=offset < NUM_RESIDENT, load_ms=5_000)
                for offset, name in enumerate(names)
            )
            slots = self._scale.num_slots
            attached = ExecutorAttached(f"e{number}", 1, "i", slots, NUM_RESIDENT, models)
            self.handle(attached)

    def fill(self, num_queued: int) -> float:
        """Submit until so many wait; the longest Submit in milliseconds."""
        longest_ns = 0
        step = max(num_queued // 4, 100_000)
        while self.core.num_waiting < num_queued:
            longest_ns = max(longest_ns, self.handle(Submit(self.traffic.request())))
            if self.core.num_waiting % step == 0 and self.core.num_waiting:
                print(f"    {self.core.num_waiting:,} wait", flush=True)
        return longest_ns / 1e6

    def handle(self, event: Event) -> int:
        """Nanoseconds in ``Scheduler.handle`` for an event and what it leads to at once."""
        start = time.thread_time_ns()
        effects = self.core.handle(event, self.now_ms)
        spent = time.thread_time_ns() - start
        for answer in self._answers(effects):
            spent += self.handle(answer)
        return spent

    def _answers(self, effects: Effects) -> list[Event]:
        answers: list[Event] = []
        for action in effects.send:
            match action:
                case LeaseGranted():
                    self._running.append(action)
                    self.counts["grants"] += 1
                case ModelLoadOrdered():
                    self.counts["loads"] += 1
                    ref = (action.executor_id, action.session)
                    for model in action.evict:
                        answers.append(ModelChanged(*ref, model, ModelState.ABSENT))
                    resident = ModelState.RESIDENT
                    answers.append(ModelChanged(*ref, action.model, resident, 5_000))
                case RequestRejected():
                    raise AssertionError(f"refused: {action.message}")
                case RequestFinished():
                    assert action.reason is None, action
        return answers

    def decide(self) -> tuple[int, int]:
        """One decision: nanoseconds for the end with its grant, and for the arrival."""
        due_ms = self.core.next_deadline_ms()
        spent = 0
        if due_ms is not None and due_ms <= self.now_ms:
            self.counts["ticks"] += 1
            spent = self.handle(Tick())
        running = self._running
        chosen = self._random.randrange(len(running))
        running[chosen], running[-1] = running[-1], running[chosen]
        lease = running.pop()
        request_id, attempt = lease.request_id, lease.attempt
        name, session, done = lease.executor_id, lease.session, LeaseOutcome.COMPLETED
        end = LeaseEnded(name, session, request_id, EPOCH, attempt, done, 50)
        arrival = Submit(self.traffic.request())
        return spent + self.handle(end), self.handle(arrival)


def measure(scale: Scale, num_queued: int) -> dict[str, float]:
    """Fill a fresh core up to a queue length, then make decisions and time each one."""
    print(f"Headway, {num_queued:,} queued:", flush=True)
    brain = Brain(scale, num_queued)
    brain.attach_all()
    started = time.perf_counter()
    fill_max_ms = brain.fill(num_queued)
    fill_s = time.perf_counter() - started
    gc.collect()
    gc.freeze()
    ends, arrivals, both = [], [], []
    num_warm_up = scale.num_decisions // 20
    pauses = Pauses()
    started = time.perf_counter()
    for number in range(scale.num_decisions + num_warm_up):
        if number % DECISIONS_PER_MS == 0:
            brain.now_ms += 1
        if number == num_warm_up:
            brain.counts.clear()
        end_ns, arrival_ns = brain.decide()
        if number >= num_warm_up:
            ends.append(end_ns)
            arrivals.append(arrival_ns)
            both.append(end_ns + arrival_ns)
    wall_s = time.perf_counter() - started
    pauses.close()
    gc.unfreeze()
    mean_us = statistics.fmean(both) / 1e3
    found = {
        "num_queued": num_queued,
        "num_queued_at_end": brain.core.num_waiting,
        "decisions_per_s": round(1e6 / mean_us),
        "wall_decisions_per_s": round((len(both) + num_warm_up) / wall_s),
        "mean_us": round(mean_us, 2),
        "p50_us": quantile_us(both, 0.5),
        "p99_us": quantile_us(both, 0.99),
        "max_ms": round(max(both) / 1e6, 3),
        "collector_max_ms": round(pauses.longest_ns / 1e6, 3),
        "end_and_grant_mean_us": round(statistics.fmean(ends) / 1e3, 2),
        "end_and_grant_p99_us": quantile_us(ends, 0.99),
        "submit_mean_us": round(statistics.fmean(arrivals) / 1e3, 2),
        "submit_p99_us": quantile_us(arrivals, 0.99),
        "grants_per_decision": round(brain.counts["grants"] / scale.num_decisions, 3),
        "loads_per_1000": round(1e3 * brain.counts["loads"] / scale.num_decisions, 2),
        "fill_s": round(fill_s, 2),
        "fill_max_ms": round(fill_max_ms, 2),
    }
    print(
        f"    {found['decisions_per_s']:,} decisions/s, p50 {found['p50_us']} us, "
        f"p99 {found['p99_us']} us, longest {found['max_ms']} ms",
        flush=True,
    )
    return found


def quantile_us(nanoseconds: list[int], quantile: float) -> float:
    """By nearest rank, in microseconds."""
    ordered = sorted(nanoseconds)
    return round(ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] / 1e3, 2)


# --- the reference's method ----------------------------------------------------------------------


@dataclass(slots=True)
class Entry:
    """A waiting request of the reference."""

    model: str
    arrived_s: float


class SortEverything:
    """llamacpp-ha's dispatch cycle (scheduling.md, 6.2-6.6), without sessions and timeouts."""

    bonus, equalization_s = 10.0, 30.0

    def __init__(self, scale: Scale, num_queued: int) -> None:
        self._random = random.Random(3)
        self._models = [f"model-{number}" for number in range(scale.num_models)]
        self._capacity = scale.num_slots
        self._max_models = NUM_RESIDENT
        count = scale.num_reference_backends
        # backend -> model -> requests that run
        self.active: list[dict[str, int]] = [{} for _ in range(count)]
        self.acquired = [0] * count
        self._serving: dict[str, list[int]] = {model: [] for model in self._models}
        for backend in range(count):
            for offset in range(NUM_OFFERED):
                number = (backend * NUM_RESIDENT + offset) % scale.num_models
                self._serving[self._models[number]].append(backend)
            for offset in range(self._capacity):
                number = (backend * NUM_RESIDENT + offset % NUM_RESIDENT) % scale.num_models
                self._acquire(backend, self._models[number])
        self.pending: list[Entry] = []
        self._now_s = 0.0
        for _ in range(num_queued):
            self._enqueue()
        self._now_s += 1.0

    def _enqueue(self) -> None:
        self._now_s += 1e-4
        self.pending.append(Entry(self._random.choice(self._models), self._now_s))

    def decide(self) -> int:
        """Nanoseconds of one cycle after a release and an arrival."""
        busy = [backend for backend, used in enumerate(self.acquired) if used]
        backend = self._random.choice(busy)
        model = self._random.choice(sorted(self.active[backend]))
        start = time.thread_time_ns()
        self.acquired[backend] -= 1
        self.active[backend][model] -= 1
        if not self.active[backend][model]:
            del self.active[backend][model]
        self._enqueue()
        self._cycle()
        return time.thread_time_ns() - start

    def _cycle(self) -> None:
        entries = sorted(self.pending, key=self._priority, reverse=True)
        rest: list[Entry] = []
        reserved: dict[int, str] = {}
        represented: set[str] = set()
        for entry in entries:  # the diversity pass
            if entry.model in represented or self._is_warm(entry.model):
                rest.append(entry)
            elif self._place(entry, reserved):
                represented.add(entry.model)
            else:
                drained = self._drain(entry.model)
                if drained is not None:
                    reserved[drained] = entry.model
                rest.append(entry)
        for entry in rest:  # the priority pass
            self._place(entry, reserved)

    def _priority(self, entry: Entry) -> float:
        waited_s = self._now_s - entry.arrived_s
        warm = self.bonus if self._is_warm(entry.model) else 0.0
        return waited_s * (self.bonus / self.equalization_s) + warm

    def _is_warm(self, model: str) -> bool:
        return any(model in self.active[backend] for backend in self._serving[model])

    def _can_accept(self, backend: int, model: str) -> bool:
        active = self.active[backend]
        return self.acquired[backend] < self._capacity and (
            model in active or len(active) < self._max_models
        )

    def _place(self, entry: Entry, reserved: dict[int, str]) -> bool:
        usable = [
            backend
            for backend in self._serving[entry.model]
            if self._can_accept(backend, entry.model)
            and reserved.get(backend, entry.model) == entry.model
        ]
        if not usable:
            return False
        self._acquire(min(usable, key=lambda backend: self.acquired[backend]), entry.model)
        self.pending.remove(entry)
        return True

    def _drain(self, model: str) -> int | None:
        free = [
            backend for backend in self._serving[model] if self.acquired[backend] < self._capacity
        ]
        eligible = [
            backend
            for backend in free
            if all(len(self._serving[other]) > 1 for other in self.active[backend])
        ]
        return min(eligible, key=lambda backend: self.acquired[backend], default=None)

    def _acquire(self, backend: int, model: str) -> None:
        self.acquired[backend] += 1
        self.active[backend][model] = self.active[backend].get(model, 0) + 1


def measure_reference(scale: Scale, num_queued: int) -> dict[str, float]:
    """Time the reference's cycles at a queue length."""
    print(f"sort everything, {num_queued:,} queued:", flush=True)
    reference = SortEverything(scale, num_queued)
    spent = [reference.decide() for _ in range(scale.num_reference_decisions)]
    mean_us = statistics.fmean(spent) / 1e3
    print(f"    {1e6 / mean_us:,.0f} decisions/s, mean {mean_us / 1e3:.2f} ms", flush=True)
    return {
        "num_queued": num_queued,
        "num_backends": scale.num_reference_backends,
        "decisions_per_s": round(1e6 / mean_us, 1),
        "mean_us": round(mean_us, 1),
        "max_ms": round(max(spent) / 1e6, 2),
    }


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
        "decisions_per_s": shown["decisions_per_s"],
        "p50_us": shown["p50_us"],
        "p99_us": shown["p99_us"],
        "max_ms": shown["max_ms"],
        "mean_ratio_1m_to_1k": round(mean_ratio, 2),
        "reference_ratio": round(theirs[shared]["mean_us"] / ours[shared]["mean_us"], 1),
        "shown_at": scale.shown,
        "reference_ratio_at": shared,
        "num_executors": scale.num_executors,
        "num_models": scale.num_models,
        "num_tenants": scale.num_tenants,
        "num_decisions": scale.num_decisions,
        "python": platform.python_version(),
        "headway": list(ours.values()),
        "reference": list(theirs.values()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.core", description="See the module.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean little")
    arguments = parser.parse_args()
    print(json.dumps(run(QUICK if arguments.quick else FULL)))


if __name__ == "__main__":
    main()
