"""What everybody is promised, checked while clients that never let up do their worst: nobody
starves, and two tenants of a flow that both wait are served alike (scenes.py, watch.py).

The suite plays the same runs each time. A search that differs each time would fail some day for
somebody whose change is innocent; what breaks once in thousands of runs is what ``hunt.py`` is for.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from scheduler_svc.core.messages import (
    Cancel,
    DrainExecutor,
    ExecutorCapacityChanged,
    UndrainExecutor,
)
from tests.machine.honest_executor import FOREVER_MS, Executor
from tests.machine.honest_fleet import MAX_TOKENS, NUM_PROMPT, Stream
from tests.machine.scenes import Scene, drawn
from tests.machine.watch import Watch

Thing = TypeVar("Thing")

# looks at whether those who wait have started, in the time that a model may go without a grant
_NUM_LOOKS = 64
# stretches of time that pass from one check of all indexes to the next
_CHECK_EVERY = 8
# any number is taken as one of so many things
NUMBERS = st.integers(0, 15)


class BoundsMachine(RuleBasedStateMachine):
    """Streams come and go, requests are cancelled, executors come, go, drain and fail loads."""

    def __init__(self) -> None:
        super().__init__()
        self.begin(Scene())

    def begin(self, scene: Scene) -> None:
        self.scene = scene
        self.watch = Watch(scene)
        self.world = self.watch.world
        self.num_runs = 0

    @initialize(
        seed=st.sampled_from((0, 0, *range(1, 100))),
        num_slots=NUMBERS,
        max_models=NUMBERS,
        depths=st.lists(st.integers(0, 2), min_size=6, max_size=6),
        has_shares=st.booleans(),
    )
    def start(
        self, seed: int, num_slots: int, max_models: int, depths: list[int], has_shares: bool
    ) -> None:
        """One executor, and models that more is asked of than it can do."""
        scene = drawn(seed)
        if has_shares and not seed:
            scene = replace(scene, settings=replace(scene.settings, band_min_shares=(0.0, 0.2)))
        self.begin(scene)
        self.attach(0, num_slots, max_models, set(range(len(scene.models))))
        for number, depth in zip(range(len(scene.models)), depths, strict=False):
            lease_ms = round(scene.lease_ms * (1, 0.65, 0.45)[number % 3])
            self.add("t0", scene.models[number], 0, depth, lease_ms, MAX_TOKENS)

    # --- the fleet ----------------------------------------------------------------------

    @rule(executor=NUMBERS, num_slots=NUMBERS, max_models=NUMBERS, offers=st.sets(NUMBERS))
    def attach(self, executor: int, num_slots: int, max_models: int, offers: set[int]) -> None:
        """A new process, in place of another one if that is still there."""
        name = _one(self.scene.executors, executor)
        its = self.world.executors.get(name, Executor(name))
        self.disturbed()
        self.world.lose(its)
        self.size(its, num_slots, max_models)
        models = self.scene.models
        its.offers = frozenset({models[0], models[1], *(_one(models, one) for one in offers)})
        self.world.attach(its)

    def size(self, executor: Executor, num_slots: int, max_models: int) -> None:
        executor.num_slots = 1 + num_slots % self.scene.most_slots
        executor.max_models = 1 + max_models % self.scene.most_models

    def disturbed(self) -> None:
        self.watch.disturbed(self.scene.settings.executor_grace_ms)

    @rule(executor=NUMBERS)
    def lose(self, executor: int) -> None:
        """It crashes, and all that ran there goes back. One stays."""
        its = self.attached(executor)
        if its is not None and its.name != self.scene.executors[0]:
            self.disturbed()
            self.world.lose(its)

    @rule(executor=NUMBERS, away_ms=st.sampled_from((1, 50, 500, 2_000)))
    def blink(self, executor: int, away_ms: int) -> None:
        """Its stream breaks, and it comes back with what it had."""
        its = self.attached(executor)
        if its is not None:
            self.disturbed()
            self.world.leave(its)
            self.run(away_ms)
            self.disturbed()
            self.world.come_back(its)

    @rule(executor=NUMBERS)
    def shut_down(self, executor: int) -> None:
        """It takes nothing new, gives back what it has, and goes. One stays."""
        its = self.attached(executor)
        if its is not None and its.name != self.scene.executors[0]:
            self.disturbed()
            its.is_draining = True
            self.world.handle(DrainExecutor(its.name))
            for event in its.give_back():
                self.world.handle(event)
            self.world.leave(its)

    @rule(executor=NUMBERS, is_draining=st.sampled_from((False, False, True)))
    def drain(self, executor: int, is_draining: bool) -> None:
        its = self.attached(executor)
        if its is not None:
            self.watch.disturbed()
            its.is_draining = is_draining
            self.world.handle(DrainExecutor(its.name) if is_draining else UndrainExecutor(its.name))

    @rule(executor=NUMBERS, num_slots=NUMBERS, max_models=NUMBERS)
    def resize(self, executor: int, num_slots: int, max_models: int) -> None:
        """It can take more or less than before; what it has stays."""
        its = self.attached(executor)
        if its is not None:
            self.watch.disturbed()
            self.size(its, num_slots, max_models)
            assert its.session is not None
            self.world.handle(
                ExecutorCapacityChanged(its.name, its.session, its.num_slots, its.max_models)
            )

    @rule(executor=NUMBERS, num=st.integers(1, 3))
    def fail_loads(self, executor: int, num: int) -> None:
        its = self.attached(executor)
        if its is not None:
            its.num_loads_to_fail = num

    def attached(self, number: int) -> Executor | None:
        its = self.world.executors.get(_one(self.scene.executors, number))
        return its if its is not None and its.session is not None else None

    # --- clients ------------------------------------------------------------------------

    @rule(
        tenant=NUMBERS,
        model=NUMBERS,
        band=NUMBERS,
        depth=st.sampled_from((2, 1, 3, 0)),
        is_short=st.booleans(),
        num_tokens=st.integers(0, MAX_TOKENS),
        session_id=st.sampled_from(("", "s")),
        num_blocks=st.sampled_from((0, 0, 2)),
        queue_timeout_ms=st.sampled_from((FOREVER_MS, FOREVER_MS, 70, 700)),
        execution_timeout_ms=st.sampled_from((FOREVER_MS, FOREVER_MS, 30)),
        num_samples=st.sampled_from((1, 1, 1, 2, 4)),
    )
    def stream(
        self,
        tenant: int,
        model: int,
        band: int,
        depth: int,
        is_short: bool,
        num_tokens: int,
        session_id: str,
        num_blocks: int,
        queue_timeout_ms: int,
        execution_timeout_ms: int,
        num_samples: int,
    ) -> None:
        """A client changes its mind; depth 0 ends its stream."""
        self.add(
            _one(self.scene.tenants, tenant),
            _one(self.scene.models, model),
            band % self.scene.settings.num_bands,
            depth,
            self.scene.lease_ms // (4 if is_short else 1),
            num_tokens,
            session_id,
            queue_timeout_ms,
            min(num_samples, self.scene.most_slots),
            execution_timeout_ms,
            tuple(range(num_blocks)),
            NUM_PROMPT if num_blocks else 0,
        )

    def add(self, tenant: str, model: str, band: int, depth: int, *about: Any) -> None:
        stream = Stream(tenant, model, band, depth, *about)
        self.world.streams[tenant, model, band] = stream
        self.world.top_up()

    @rule(model=NUMBERS, band=NUMBERS, num_tokens=st.integers(0, MAX_TOKENS))
    def rivals(self, model: int, band: int, num_tokens: int) -> None:
        """All tenants want the same."""
        for tenant in self.scene.tenants:
            name = tenant, _one(self.scene.models, model), band % self.scene.settings.num_bands
            self.add(*name, 2, self.scene.lease_ms, num_tokens)

    @rule(tenant=NUMBERS, model=NUMBERS, band=NUMBERS)
    def submit(self, tenant: int, model: int, band: int) -> None:
        """One request among the streams."""
        self.world.submit(self.once(tenant, model, band))

    def once(self, tenant: int, model: int, band: int) -> Stream:
        scene = self.scene
        name = _one(scene.tenants, tenant), _one(scene.models, model)
        return Stream(*name, band % scene.settings.num_bands, 1, scene.lease_ms, MAX_TOKENS)

    @rule(tenant=NUMBERS, model=NUMBERS)
    def come_back(self, tenant: int, model: int) -> None:
        """Somebody is served, stays away while others are served, and wants more than ever."""
        once = self.once(tenant, model, 0)
        self.world.submit(once)
        self.leave_alone()
        for _ in range(3):
            self.world.submit(once)
        self.run(100)

    @rule(number=NUMBERS)
    def cancel(self, number: int) -> None:
        """Some live request, waiting or running."""
        live = list(self.world.clients)
        if live:
            name = _one(live, number)
            self.world.handle(Cancel(name, self.world.clients[name].request.tenant))

    @rule()
    def calm_down(self) -> None:
        """All streams end; who waits goes on waiting."""
        self.world.streams.clear()

    # --- time ---------------------------------------------------------------------------

    @rule(ms=st.sampled_from((10, 100, 1_000)))
    def let_time_pass(self, ms: int) -> None:
        self.run(ms)

    @rule()
    def leave_alone(self) -> None:
        """Until all have started who wait, or somebody has waited for longer than he may."""
        end_ms = self.world.now_ms + self.scene.flow_ms + self.scene.model_ms
        waiting, served = self.world.waiting(), self.watch.served()
        old = [c.request.request_id for c in waiting if c.request.model in served]
        self.run(self.scene.lease_ms)
        while self.world.now_ms < end_ms and any(map(self.world.is_waiting, old)):
            self.run(self.scene.model_ms // _NUM_LOOKS)

    @rule()
    def leave_alone_for_long(self) -> None:
        """Until what grows slowly must show: for twice the time that a model may wait."""
        self.run(2 * self.scene.model_ms)

    def run(self, ms: int) -> None:
        self.world.run(ms)
        self.num_runs += 1
        if self.num_runs % _CHECK_EVERY == 0:
            self.world.core.check_invariants()
        self.watch.clean()


def _one(things: Sequence[Thing], number: int) -> Thing:
    return things[number % len(things)]


BoundsMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestBoundsMachine = BoundsMachine.TestCase
