"""What everybody is promised, checked while clients that never let up do their worst: nobody
starves, and two tenants of a flow that both wait are served alike.

Times, all in milliseconds. A disturbance (an executor comes, goes, or fails a load) starts them
anew: the promises are about a fleet that is left alone.

MODEL_MS: so long may a model whose requests wait go without a grant, from when the oldest of them
came, or from its last grant.

    W  until it counts as of the first band, where age decides: the largest of ``band_max_wait_ms``
    E  and until it may drain a last home: twice ``aging_equalization_ms``, because its head may
       always be somebody who just came
    R  turns of the models, one after another on one executor. A turn is D + X + L: the dwell after
       a forced switch, ``load / switch_time_share``; what the leases there still need, at most
       the longest one; the load. Each other model may be placeless for longer, so it goes first;
       bands that are owed (``band_min_shares``) may each take one turn out of order
    S  while it shares a home: all that is older and waits for the same slots, one after another;
       each may need all slots, and so wait for what runs there before it runs itself

FLOW_MS: the same for one band of a model. In the worst case everything older that waits for the
model goes first, one for each time that the model has its place.

OVERTAKEN: so many grants of its own flow may come before a request. That is who waited when it
came, and who has a right to overtake it: tenants that had less, until their virtual time has passed
the one at which it would start. What they can be behind is GAP and the requests of its own tenant
before it; each grant moves them by at least what a request uses / the largest weight.

So every request starts within FLOW_MS x (OVERTAKEN + 1): each factor is checked.

GAP: so far may the virtual times of two tenants of a flow be apart while both wait: Q + L + 2 C. Q
is ``locality_quantum_tokens``, L the largest request / the smallest weight, C the same for all that
may run at once. A tenant's key rises by L at most when it is granted, and it is granted only if it
is the smallest, or Q above it. The other's key falls only by what the ends of its requests take
off, which ran at that grant: C. The second C is what they may be apart when the later one begins to
wait, since it starts at the tokens really served, without what runs (fairness.py). After a grant
the machine knows the tight bound: Q + this request + what of the other one's ran then.
"""

from collections import Counter
from dataclasses import replace
from itertools import permutations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.core.messages import (
    Action,
    Cancel,
    DrainExecutor,
    Event,
    ExecutorDisconnected,
    LeaseEnded,
    LeaseGranted,
    ModelChanged,
    ModelState,
    UndrainExecutor,
)
from tests.machine.honest_fleet import (
    FOREVER_MS,
    LOAD_MS,
    MAX_TOKENS,
    NUM_PROMPT,
    Client,
    Executor,
    Stream,
    World,
)

MODELS = ("A", "B", "C")
TENANTS = ("t0", "t1", "t2")
NUM_BANDS = 2
NUM_EXECUTORS, MOST_SLOTS = 2, 2
LEASE_MS = 200
SETTINGS = CoreSettings(
    max_queued_requests=8,
    max_inflight=16,
    max_inflight_per_tenant=10,
    num_bands=NUM_BANDS,
    band_max_wait_ms=(300, 500),
    aging_equalization_ms=400,
    switch_time_share=0.5,
    model_hold_ms=50,
    tenant_weights={"t1": 2.0},
    locality_quantum_tokens=15,
    executor_grace_ms=100,
    max_known_models=1,
    load_backoff_ms=50,
    load_backoff_max_ms=100,
)

NUM_WAITING = SETTINGS.max_queued_requests
_TURN_MS = round(LOAD_MS / SETTINGS.switch_time_share) + LEASE_MS + LOAD_MS
MODEL_MS = (
    max(SETTINGS.band_max_wait_ms)
    + 2 * SETTINGS.aging_equalization_ms
    + (len(MODELS) + NUM_BANDS) * _TURN_MS
    + 2 * NUM_WAITING * LEASE_MS
)
FLOW_MS = NUM_WAITING * MODEL_MS
_MOST_TOKENS = NUM_PROMPT + SETTINGS.output_token_weight * MAX_TOKENS * MOST_SLOTS
_WEIGHTS = [SETTINGS.tenant_weights.get(tenant, 1.0) for tenant in TENANTS]
_LARGEST = _MOST_TOKENS / min(_WEIGHTS)
_LEAST = NUM_PROMPT / max(_WEIGHTS)
GAP = SETTINGS.locality_quantum_tokens + _LARGEST + 2 * NUM_EXECUTORS * MOST_SLOTS * _LARGEST
OVERTAKEN = NUM_WAITING + (len(TENANTS) - 1) * (GAP + NUM_WAITING * _LARGEST) / _LEAST

Flow = tuple[int, str]


class Pairs:
    """Tenants of a flow that both wait since some time: how far apart they may be."""

    def __init__(self, world: World) -> None:
        self._world = world
        # (flow, who is ahead, who is behind) -> the most that the first key may exceed the second
        self._limits: dict[tuple[Flow, str, str], float] = {}
        # by flow and tenant: charged for what runs; virtual time since both were first seen to wait
        self._open: Counter[tuple[Flow, str]] = Counter()
        self._keys: dict[tuple[Flow, str], float] = {}

    def forget(self) -> None:
        """Something was lost: nobody knows what is charged."""
        self._limits.clear()
        self._keys.clear()

    def granted(self, client: Client, was_granted: bool) -> None:
        """A request got a lease; ``was_granted``: once more, so it was nobody's turn."""
        cost = self._cost(client)
        flow, tenant = self._pay(client, cost)
        self._open[flow, tenant] += cost
        for (its_flow, one, other), limit in self._limits.items():
            if (its_flow, one) == (flow, tenant):
                more = cost / self._weight(tenant)
                at_most = SETTINGS.locality_quantum_tokens + self._running(flow, other) + more
                self._limits[flow, one, other] = limit + more if was_granted else at_most

    def ended(self, client: Client, num_tokens: int) -> None:
        """Its lease ended, and used so much."""
        used = NUM_PROMPT + SETTINGS.output_token_weight * num_tokens
        cost = self._cost(client)
        name = self._pay(client, used - cost)
        self._open[name] -= cost

    def check(self) -> None:
        """After each event."""
        flows: dict[Flow, dict[str, None]] = {}
        for client in self._world.waiting():
            if not client.was_granted:
                request = client.request
                flows.setdefault((request.band, request.model), {})[request.tenant] = None
        both = {(flow, *pair) for flow, its in flows.items() for pair in permutations(its, 2)}
        fairness = self._world.core._state.queue.fairness
        self._limits = {pair: limit for pair, limit in self._limits.items() if pair in both}
        now = {
            (flow, name): fairness.key(flow, name) for flow, its in flows.items() for name in its
        }
        for name, key in now.items():
            assert abs(self._keys.get(name, key) - key) < 1e-6, "paid for something else"
        self._keys = now
        for flow, one, other in sorted(both):
            gap = now[flow, one] - now[flow, other]
            first = gap + self._running(flow, other)
            limit = self._limits.setdefault((flow, one, other), first)
            assert gap <= limit + 1e-6
            assert gap <= GAP

    def _pay(self, client: Client, tokens: int) -> tuple[Flow, str]:
        request = client.request
        name = (request.band, request.model), request.tenant
        if name in self._keys:
            self._keys[name] += tokens / self._weight(request.tenant)
        return name

    def _cost(self, client: Client) -> int:
        """What a grant charges."""
        num_output = MAX_TOKENS * client.request.num_samples
        return NUM_PROMPT + SETTINGS.output_token_weight * num_output

    def _running(self, flow: Flow, tenant: str) -> float:
        return self._open[flow, tenant] / self._weight(tenant)

    def _weight(self, tenant: str) -> float:
        return SETTINGS.tenant_weights.get(tenant, 1.0)


class BoundsMachine(RuleBasedStateMachine):
    """Streams come and go, requests are cancelled, executors come, go, drain and fail loads."""

    def __init__(self) -> None:
        super().__init__()
        self.begin(has_shares=False)
        self.calm_since_ms = 0
        # of models and of flows
        self.last_grant_ms: dict[Flow | str, int] = {}
        # of flows: grants so far, and when a request was first seen to wait in calm
        self.num_grants: Counter[Flow] = Counter()
        self.num_grants_at: dict[str, int] = {}
        # as they were before the event in hand
        self.known: dict[str, Client] = {}
        self.were_granted: set[str] = set()

    def begin(self, has_shares: bool) -> None:
        shares = (0.0, 0.2) if has_shares else ()
        self.world = World(replace(SETTINGS, band_min_shares=shares), self.heard)
        self.pairs = Pairs(self.world)

    # --- promises -----------------------------------------------------------------------

    def heard(self, event: Event, sent: list[Action]) -> None:
        now_ms = self.world.now_ms
        self.known.update(self.world.clients)
        if isinstance(event, ModelChanged) and event.state is ModelState.FAILED:
            self.disturbed(SETTINGS.load_backoff_max_ms)
        if isinstance(event, LeaseEnded):
            self.pairs.ended(self.known[event.request_id], event.num_generated_tokens)
        for action in sent:
            if isinstance(action, LeaseGranted):
                client = self.known[action.request_id]
                model, flow = client.request.model, (client.request.band, client.request.model)
                self.last_grant_ms[model] = self.last_grant_ms[flow] = now_ms
                self.num_grants[flow] += 1
                self.pairs.granted(client, action.request_id in self.were_granted)
                self.were_granted.add(action.request_id)
        if now_ms < self.calm_since_ms:
            self.pairs.forget()
            self.num_grants_at.clear()
            return
        self.pairs.check()
        self.nobody_starves()

    def nobody_starves(self) -> None:
        now_ms, since_ms = self.world.now_ms, dict[Flow | str, int]()
        served = {
            model
            for executor in self.world.executors.values()
            if executor.session is not None and not executor.is_draining
            for model in executor.offers
        }
        for name, client in self.world.clients.items():
            model, flow = client.request.model, (client.request.band, client.request.model)
            if model in served and client.is_waiting:
                came_ms = max(client.accepted_ms, self.calm_since_ms)
                for what in (model, flow):
                    since_ms[what] = min(came_ms, since_ms.get(what, came_ms))
                num_at = self.num_grants_at.setdefault(name, self.num_grants[flow])
                assert self.num_grants[flow] - num_at <= OVERTAKEN, client
        for what, came_ms in since_ms.items():
            limit_ms = MODEL_MS if isinstance(what, str) else FLOW_MS
            assert now_ms - max(came_ms, self.last_grant_ms.get(what, 0)) <= limit_ms, what

    def disturbed(self, for_ms: int = 0) -> None:
        self.calm_since_ms = max(self.calm_since_ms, self.world.now_ms + for_ms + 1)
        self.pairs.forget()

    # --- the fleet ----------------------------------------------------------------------

    @initialize(
        num_slots=st.integers(1, MOST_SLOTS),
        max_models=st.sampled_from((1, 1, 2)),
        depths=st.tuples(*[st.integers(0, 2)] * len(MODELS)),
        has_shares=st.booleans(),
    )
    def start(
        self, num_slots: int, max_models: int, depths: tuple[int, ...], has_shares: bool
    ) -> None:
        """One executor, and models that more is asked of than it can do."""
        self.begin(has_shares)
        self.attach("e0", num_slots, max_models, set(MODELS))
        for model, depth, lease_ms in zip(MODELS, depths, (LEASE_MS, 130, 90), strict=True):
            self.stream("t0", model, 0, depth, lease_ms, MAX_TOKENS, "", FOREVER_MS)

    @rule(
        name=st.sampled_from(["e0", "e1"]),
        num_slots=st.integers(1, MOST_SLOTS),
        max_models=st.integers(1, 2),
        offers=st.sets(st.sampled_from(MODELS), min_size=2),
    )
    def attach(self, name: str, num_slots: int, max_models: int, offers: set[str]) -> None:
        """A new process, in place of another one if that is still there."""
        executor = self.world.executors.get(name, Executor(name))
        self.lose(name)
        executor.num_slots, executor.max_models = num_slots, max_models
        executor.offers = frozenset(offers)
        self.world.attach(executor)

    @rule()
    def lose_one(self) -> None:
        self.lose("e1")

    def lose(self, name: str) -> None:
        """It crashes, and all that ran there goes back."""
        executor = self.world.executors.get(name)
        self.disturbed(SETTINGS.executor_grace_ms)
        if executor is not None and (session := self.world.lose(executor)) is not None:
            self.world.handle(ExecutorDisconnected(name, session))

    @rule(name=st.sampled_from(["e0", "e1"]), is_draining=st.sampled_from((False, False, True)))
    def drain(self, name: str, is_draining: bool) -> None:
        executor = self.world.executors.get(name)
        if executor is not None and executor.session is not None:
            self.disturbed()
            executor.is_draining = is_draining
            self.world.handle(DrainExecutor(name) if is_draining else UndrainExecutor(name))

    @rule(name=st.sampled_from(["e0", "e1"]), num=st.integers(1, 3))
    def fail_loads(self, name: str, num: int) -> None:
        executor = self.world.executors.get(name)
        if executor is not None:
            executor.num_loads_to_fail = num

    # --- clients ------------------------------------------------------------------------

    @rule(
        tenant=st.sampled_from(TENANTS),
        model=st.sampled_from(MODELS),
        band=st.integers(0, NUM_BANDS - 1),
        depth=st.sampled_from((2, 1, 3, 0)),
        lease_ms=st.sampled_from((LEASE_MS, 50)),
        num_tokens=st.integers(0, MAX_TOKENS),
        session_id=st.sampled_from(("", "s")),
        queue_timeout_ms=st.sampled_from((FOREVER_MS, FOREVER_MS, 70)),
        num_samples=st.sampled_from((1, 1, MOST_SLOTS)),
    )
    def stream(
        self,
        tenant: str,
        model: str,
        band: int,
        depth: int,
        lease_ms: int,
        num_tokens: int,
        session_id: str,
        queue_timeout_ms: int,
        num_samples: int = 1,
    ) -> None:
        """A client changes its mind; depth 0 ends its stream."""
        self.world.streams[tenant, model, band] = Stream(
            tenant,
            model,
            band,
            depth,
            lease_ms,
            num_tokens,
            session_id,
            queue_timeout_ms,
            num_samples,
        )
        self.world.top_up()

    @rule(
        model=st.sampled_from(MODELS),
        band=st.integers(0, NUM_BANDS - 1),
        num_tokens=st.integers(0, MAX_TOKENS),
    )
    def rivals(self, model: str, band: int, num_tokens: int) -> None:
        """All tenants want the same."""
        for tenant in TENANTS:
            self.stream(tenant, model, band, 2, LEASE_MS, num_tokens, "", FOREVER_MS)

    @rule(
        tenant=st.sampled_from(TENANTS),
        model=st.sampled_from(MODELS),
        band=st.integers(0, NUM_BANDS - 1),
    )
    def submit(self, tenant: str, model: str, band: int) -> None:
        """One request among the streams."""
        self.world.submit(Stream(tenant, model, band, 1, LEASE_MS, MAX_TOKENS))

    @rule(tenant=st.sampled_from(TENANTS[1:]), model=st.sampled_from(MODELS))
    def come_back(self, tenant: str, model: str) -> None:
        """Somebody is served, stays away while others are served, and wants more than ever."""
        once = Stream(tenant, model, 0, 1, LEASE_MS, MAX_TOKENS)
        self.world.submit(once)
        self.run(2 * MODEL_MS)
        for _ in range(3):
            self.world.submit(once)
        self.run(100)

    @rule(number=st.integers(0, 15))
    def cancel(self, number: int) -> None:
        """Some live request, waiting or running."""
        live = list(self.world.clients)
        if live:
            name = live[number % len(live)]
            self.world.handle(Cancel(name, self.world.clients[name].request.tenant))

    # --- time ---------------------------------------------------------------------------

    @rule(ms=st.sampled_from((10, 100, 1_000)))
    def let_time_pass(self, ms: int) -> None:
        self.run(ms)

    @rule(ms=st.sampled_from((2 * MODEL_MS, 2 * MODEL_MS, FLOW_MS + MODEL_MS)))
    def leave_alone(self, ms: int) -> None:
        """For longer than a model, or even a flow, may go without a grant."""
        self.run(ms)

    def run(self, ms: int) -> None:
        self.world.run(ms)
        self.world.core.check_invariants()
        for client in list(self.known):
            if client not in self.world.clients and not self.is_running(client):
                del self.known[client]

    def is_running(self, request_id: str) -> bool:
        return any(request_id in executor.leases for executor in self.world.executors.values())


BoundsMachine.TestCase.settings = settings(
    derandomize=True,  # a bound that breaks once in thousands of runs is searched for by hand
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestBoundsMachine = BoundsMachine.TestCase
