"""The simulator: one heap of things to come, a policy, executors, and a wire between them.

Rule: time is whole milliseconds and stands still while something is handled; what falls on the
same millisecond happens in the order in which it was planned. Nothing is drawn at random in here.
So a workload, a fleet and a fault list give one event log, whose hash is the run's name.

The wire: each session is an ordered stream both ways. A session that breaks loses what is under
way; the policy is told ExecutorDisconnected, the executor attaches again ``RECONNECT_MS`` later.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from time import perf_counter_ns
from typing import Any

from bench.sim.costs import Costs
from bench.sim.executor import Executor
from bench.sim.faults import SLOW_MS, Fault
from bench.sim.journal import Journal
from bench.sim.policy import EPOCH, Policy
from bench.sim.work import Work
from bench.sim.workload import Fleet, Job
from scheduler_svc.core.messages import (
    Action,
    Cancel,
    Event,
    ExecutorDisconnected,
    LeaseStarted,
    Request,
    RequestAdmitted,
    RequestDeduplicated,
    RequestFinished,
    RequestRejected,
    SessionClosed,
    Submit,
    Tick,
)

RECONNECT_MS = 500
# scheduler_svc.settings: heartbeat_timeout_ms
HEARTBEAT_TIMEOUT_MS = 5_000
# One hour for each clock: long enough that waits are seen rather than cut off.
QUEUE_TIMEOUT_MS = 3_600_000
EXECUTION_TIMEOUT_MS = 3_600_000
_FOR_CLIENTS = (RequestAdmitted, RequestDeduplicated, RequestFinished, RequestRejected)


class World:
    """One run; build it, call ``run`` once, read the journal."""

    def __init__(
        self,
        policy: Policy,
        fleet: Fleet,
        costs: Costs,
        models: list[str],
        jobs: Sequence[Job],
        faults: Sequence[Fault] = (),
        *,
        wire_ms: int = 1,
        sample_ms: int | None = None,
    ) -> None:
        self.journal = Journal(jobs)
        self.executors = {
            f"e{number}": Executor(number, fleet, costs, models, EPOCH)
            for number in range(fleet.num_executors)
        }
        self.now_ms = 0
        # Time in the policy, and how often it was called. Wall time: a thread's own clock is a
        # system call that can cost more than what it measures.
        self.policy_ns = 0
        self.num_events = 0
        self._policy = policy
        self._jobs = jobs
        self._wire_ms = wire_ms
        self._sample_ms = sample_ms
        self._heap: list[tuple[int, int, Callable[[Any], None], Any]] = []
        self._num_planned = 0
        self._tick_ms: int | None = None
        # executor -> when it next wakes by itself; other entries of the heap are void
        self._wake_ms: dict[str, int] = {}
        # executor -> the session that its connection carries; 0: none
        self._sessions = dict.fromkeys(self.executors, 0)
        self._num_sessions = 0
        # (executor, is it the way to the policy) -> when the last message arrives
        self._arrivals: dict[tuple[str, bool], int] = {}
        # executor -> until when its messages are slow, and until when it does nothing
        self._slow_until: dict[str, int] = {}
        self._frozen_until: dict[str, int] = {}
        for executor_id in self.executors:
            self._plan(0, self._attach, executor_id)
        for fault in faults:
            self._plan(fault.at_ms, self._break, fault)
        if sample_ms is not None:
            self._plan(sample_ms, self._sample, None)
        self._plan(0, self._open, None)

    def run(self) -> Journal:
        """Until every job has ended, or nothing can happen any more."""
        heap = self._heap
        while heap and self.journal.num_open:
            self.now_ms, _, act, what = heappop(heap)
            act(what)
        return self.journal

    def _plan(self, at_ms: int, act: Callable[[Any], None], what: Any) -> None:
        self._num_planned += 1
        heappush(self._heap, (at_ms, self._num_planned, act, what))

    # --- clients --------------------------------------------------------------------------

    def _open(self, _: None) -> None:
        """The clients come when the executors are there, at the same millisecond."""
        if self._jobs:
            self._plan(self._jobs[0].due_ms, self._arrive, 0)

    def _arrive(self, index: int) -> None:
        job = self._jobs[index]
        if index + 1 < len(self._jobs):
            self._plan(self._jobs[index + 1].due_ms, self._arrive, index + 1)
        self.journal.arrived(job.request_id)
        self._tell(
            Submit(
                Request(
                    request_id=job.request_id,
                    tenant=job.tenant,
                    model=job.model,
                    band=1,
                    num_prompt_tokens=job.num_prompt_tokens,
                    max_tokens=job.max_tokens,
                    num_samples=1,
                    num_bytes=4 * job.num_prompt_tokens,
                    queue_timeout_ms=QUEUE_TIMEOUT_MS,
                    execution_timeout_ms=EXECUTION_TIMEOUT_MS,
                )
            )
        )
        if self._sample_ms is not None and job.request_id in self.journal.waiting:
            self.journal.estimate(job.request_id, self._policy.status(job.request_id, self.now_ms))
        if job.patience_ms is not None:
            self._plan(self.now_ms + job.patience_ms, self._hang_up, job)

    def _hang_up(self, job: Job) -> None:
        self._tell(Cancel(job.request_id, job.tenant))

    def _sample(self, _: None) -> None:
        assert self._sample_ms is not None
        self.journal.sample(self._policy.status, self.now_ms)
        self._plan(self.now_ms + self._sample_ms, self._sample, None)

    # --- the policy -----------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        """The policy handles an event; its effects go on the wire."""
        began = perf_counter_ns()
        effects = self._policy.handle(event, self.now_ms)
        due_ms = self._policy.next_deadline_ms()
        self.policy_ns += perf_counter_ns() - began
        self.num_events += 1
        if effects.decisions:
            self.journal.decided(effects.decisions)
        if effects.send:
            self.journal.acted(effects.send, self.now_ms)
            self._send(effects.send)
        if due_ms is not None and (self._tick_ms is None or due_ms < self._tick_ms):
            self._tick_ms = max(due_ms, self.now_ms)
            self._plan(self._tick_ms, self._tick, self._tick_ms)

    def _tick(self, planned_ms: int) -> None:
        if planned_ms != self._tick_ms:
            return
        self._tick_ms = None
        due_ms = self._policy.next_deadline_ms()
        if due_ms is not None and due_ms <= self.now_ms:
            self._tell(Tick())
        elif due_ms is not None:
            self._tick_ms = due_ms
            self._plan(due_ms, self._tick, due_ms)

    def _send(self, actions: Sequence[Action]) -> None:
        batches: dict[tuple[str, int], list[Action]] = {}
        for action in actions:
            if isinstance(action, _FOR_CLIENTS):
                continue
            batches.setdefault((action.executor_id, action.session), []).append(action)
        for (executor_id, session), batch in batches.items():
            at_ms = self._arrival_ms(executor_id, to_policy=False)
            self._plan(at_ms, self._deliver, (executor_id, session, batch))

    def _arrival_ms(self, executor_id: str, *, to_policy: bool) -> int:
        """When a message sent now arrives; never before one that was sent earlier."""
        is_slow = self._slow_until.get(executor_id, 0) > self.now_ms
        way = (executor_id, to_policy)
        at_ms = self.now_ms + (SLOW_MS if is_slow else self._wire_ms)
        self._arrivals[way] = at_ms = max(at_ms, self._arrivals.get(way, 0))
        return at_ms

    # --- executors ------------------------------------------------------------------------

    def _deliver(self, message: tuple[str, int, list[Action]]) -> None:
        executor_id, session, batch = message
        if self._sessions[executor_id] != session:
            return
        if (frozen_ms := self._frozen_until.get(executor_id, 0)) > self.now_ms:
            self._plan(frozen_ms, self._deliver, message)
            return
        executor = self.executors[executor_id]
        executor.advance(self.now_ms)
        if any(isinstance(action, SessionClosed) for action in batch):
            self._cut(executor_id, RECONNECT_MS)
        else:
            executor.obey(batch, self.now_ms, self._work)
        self._settle(executor)

    def _work(self, request_id: str) -> Work:
        job = self.journal.records[request_id].job
        return Work(job.model, job.num_prompt_tokens, job.num_output_tokens)

    def _wake(self, executor_id: str) -> None:
        if self._wake_ms.get(executor_id) != self.now_ms:
            return
        del self._wake_ms[executor_id]
        executor = self.executors[executor_id]
        executor.advance(self.now_ms)
        self._settle(executor)

    def _settle(self, executor: Executor) -> None:
        """An executor did something: hear it, and know when to look again."""
        executor_id = executor.executor_id
        for request_id in executor.started:
            self.journal.started(request_id, self.now_ms)
        executor.started.clear()
        for event in executor.outbox:
            at_ms = self._arrival_ms(executor_id, to_policy=True)
            self._plan(at_ms, self._hear, (executor_id, executor.session, event))
        executor.outbox.clear()
        next_ms = executor.next_ms()
        if next_ms is None:
            self._wake_ms.pop(executor_id, None)
        elif self._wake_ms.get(executor_id) != next_ms:
            self._wake_ms[executor_id] = max(next_ms, self.now_ms)
            self._plan(self._wake_ms[executor_id], self._wake, executor_id)

    def _hear(self, message: tuple[str, int, Event]) -> None:
        executor_id, session, event = message
        if self._sessions[executor_id] != session:
            return
        if isinstance(event, LeaseStarted):
            self.journal.first_token(event.request_id, self.now_ms)
        self._tell(event)

    def _attach(self, executor_id: str) -> None:
        executor = self.executors[executor_id]
        executor.advance(self.now_ms)
        self._num_sessions += 1
        self._sessions[executor_id] = self._num_sessions
        hello = executor.hello(self._num_sessions)
        at_ms = self._arrival_ms(executor_id, to_policy=True) if self.now_ms else 0
        self._plan(at_ms, self._hear, (executor_id, self._num_sessions, hello))
        self._settle(executor)

    def _cut(self, executor_id: str, back_in_ms: int) -> None:
        """The connection breaks; the policy hears of it at the speed of the wire."""
        session = self._sessions[executor_id]
        self._sessions[executor_id] = 0
        self.executors[executor_id].disconnect()
        at_ms = self._arrival_ms(executor_id, to_policy=True)
        self._plan(at_ms, self._tell, ExecutorDisconnected(executor_id, session))
        self._plan(max(at_ms, self.now_ms + back_in_ms), self._attach, executor_id)

    # --- faults ---------------------------------------------------------------------------

    def _break(self, fault: Fault) -> None:
        executor_id = f"e{fault.executor}"
        if not self._sessions[executor_id] or self._frozen_until.get(executor_id, 0) > self.now_ms:
            return  # it has troubles enough
        self.journal.fault(fault.kind)
        executor = self.executors[executor_id]
        executor.advance(self.now_ms)
        self._settle(executor)
        match fault.kind:
            case "crash":
                executor.crash()
                self._cut(executor_id, fault.for_ms)
            case "drop":
                self._cut(executor_id, RECONNECT_MS)
            case "slow":
                self._slow_until[executor_id] = self.now_ms + fault.for_ms
            case "stall":
                self._frozen_until[executor_id] = self.now_ms + fault.for_ms
                executor.stall(fault.for_ms)
                if fault.for_ms >= HEARTBEAT_TIMEOUT_MS:
                    session = self._sessions[executor_id]
                    silent_ms = self.now_ms + HEARTBEAT_TIMEOUT_MS
                    self._plan(silent_ms, self._lose, (executor_id, session, fault.for_ms))
        self._settle(executor)

    def _lose(self, lost: tuple[str, int, int]) -> None:
        """No heartbeat for too long."""
        executor_id, session, stalled_ms = lost
        if self._sessions[executor_id] == session:
            self._cut(executor_id, stalled_ms - HEARTBEAT_TIMEOUT_MS)
