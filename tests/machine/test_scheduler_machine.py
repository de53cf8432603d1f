"""The scheduler's core against a simple model, under any order of events, hostile ones included."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from scheduler_svc.core.messages import LeaseOutcome, Tick
from scheduler_svc.core.scheduler import Scheduler
from tests.machine.scheduler_checks import SchedulerChecks
from tests.machine.scheduler_clients import ClientRules
from tests.machine.scheduler_executors import ExecutorRules
from tests.machine.scheduler_model import EPOCH, EXECUTORS, SETTINGS


class SchedulerMachine(ClientRules, ExecutorRules, SchedulerChecks):
    """All of them in any order, and time that passes."""

    @rule(ms=st.integers(1, 400))
    def let_time_pass(self, ms: int) -> None:
        """Without a Tick: the shell is late."""
        self.now_ms += ms

    @rule()
    def tick(self) -> None:
        self.handle(Tick())
        due_ms = self.core.next_deadline_ms()
        assert due_ms is None or due_ms > self.now_ms
        for known in self.requests.values():
            if known.end is None and known.first_grant_ms is None:
                assert self.now_ms < known.accepted_ms + known.request.queue_timeout_ms
            elif known.end is None and known.first_grant_ms is not None:
                assert self.now_ms < known.first_grant_ms + known.request.execution_timeout_ms

    @rule()
    def tick_at_next_deadline(self) -> None:
        due_ms = self.core.next_deadline_ms()
        if due_ms is not None:
            self.now_ms = max(self.now_ms, due_ms)
            self.tick()

    def teardown(self) -> None:
        """Everything ends, once, and the same events give the same effects."""
        for name, executor in self.executors.items():
            for key in sorted(executor.runs):
                if executor.session is not None and key in executor.runs:
                    self.say_ended(name, key, LeaseOutcome.COMPLETED)
        for name in EXECUTORS:
            self.disconnect(name, is_stale=False)
        while self.core.next_deadline_ms() is not None:
            self.tick_at_next_deadline()
        assert all(known.end is not None for known in self.requests.values())
        self.core.check_invariants()
        assert self.core.num_waiting == self.core.num_running == 0
        assert self.core.snapshot(self.now_ms, 1).executors == ()
        again = Scheduler(SETTINGS, EPOCH)
        for event, now_ms, effects in self.log:
            assert repr(again.handle(event, now_ms)) == effects


SchedulerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestSchedulerMachine = SchedulerMachine.TestCase
