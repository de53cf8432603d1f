"""The load of the core's benchmark: a full fleet, an endless supply of requests, a clock."""

import random
import time
from collections import Counter
from dataclasses import dataclass, replace

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
PAIRS_PER_MS = 20  # how fast the modelled clock runs
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
    num_pairs: int
    num_reference_decisions: int
    num_models: int = 32
    num_tenants: int = 200
    num_slots: int = 8
    num_reference_backends: int = 64


FULL = Scale((1_000, 10_000, 100_000, 1_000_000), (1_000, 10_000), 100_000, 1_000, 20_000, 40)
QUICK = Scale((100, 1_000), (100,), 1_000, 20, 500, 5)


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


class Brain:
    """The core under load: a clock, a full fleet, and the leases that run."""

    def __init__(self, scale: Scale, num_queued: int) -> None:
        self._scale = scale
        most = num_queued + scale.num_executors * scale.num_slots + 10_000
        settings = CoreSettings(
            max_queued_requests=most,
            band_queue_shares=(1.0,),
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
        """A pair: nanoseconds for the end with its grant, and for the arrival."""
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
