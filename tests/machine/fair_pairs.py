"""Tenants of a flow that both wait since some time: how far apart their virtual times may be."""

from collections import Counter
from itertools import permutations

from tests.machine.honest_fleet import NUM_PROMPT, Client, World
from tests.machine.scenes import Scene

Flow = tuple[int, str]

_ROUNDING = 1e-6


class Pairs:
    """Reckons for itself what everybody was charged, and compares."""

    def __init__(self, world: World, scene: Scene) -> None:
        self._world = world
        self._scene = scene
        # (flow, who is ahead, who is behind) -> the most that the first key may exceed the second
        self._limits: dict[tuple[Flow, str, str], float] = {}
        # by flow and tenant: charged for what runs; virtual time since both were first seen to wait
        self._open: Counter[tuple[Flow, str]] = Counter()
        self._keys: dict[tuple[Flow, str], float] = {}
        # of what runs: whose it is, and what it was charged
        self._charges: dict[str, tuple[tuple[Flow, str], int]] = {}

    def forget(self) -> None:
        """Something was lost: what ran there is charged no longer, and who knows what it cost."""
        self._limits.clear()
        self._keys.clear()
        running = {name for executor in self._world.executors.values() for name in executor.leases}
        for name in self._charges.keys() - running:
            self._close(name)

    def granted(self, client: Client, was_granted: bool) -> None:
        """A request got a lease; ``was_granted``: once more, so it was nobody's turn."""
        request_id, cost = client.request.request_id, self._scene.cost(client.request.num_samples)
        self._close(request_id)
        flow, tenant = name = self._pay(client, cost)
        self._open[name] += cost
        self._charges[request_id] = name, cost
        quantum, more = self._scene.settings.locality_quantum_tokens, cost / self._weight(tenant)
        for (its_flow, one, other), limit in self._limits.items():
            if (its_flow, one) == (flow, tenant):
                at_most = quantum + self._running(flow, other) + more
                self._limits[flow, one, other] = limit + more if was_granted else at_most

    def ended(self, client: Client, num_tokens: int) -> None:
        """Its lease ended, and generated so much."""
        used = NUM_PROMPT - client.stream.num_cached
        used += self._scene.settings.output_token_weight * num_tokens
        self._pay(client, max(1, used) - self._close(client.request.request_id))

    def check(self, waiting: list[Client]) -> None:
        """After each event."""
        flows: dict[Flow, dict[str, None]] = {}
        for client in waiting:
            if not client.was_granted:
                request = client.request
                flows.setdefault((request.band, request.model), {})[request.tenant] = None
        key = self._world.core._state.queue.fairness.key
        limits, keys = self._limits, self._keys
        self._limits, self._keys = {}, {}
        for flow, tenants in flows.items():
            if len(tenants) == 1:
                continue
            now = {tenant: key(flow, tenant) for tenant in tenants}
            for tenant, its in now.items():
                name = flow, tenant
                assert abs(keys.get(name, its) - its) < _ROUNDING, "paid for something else"
                self._keys[name] = its
            for one, other in permutations(tenants, 2):
                gap, pair = now[one] - now[other], (flow, one, other)
                limit = limits.get(pair)
                self._limits[pair] = gap + self._running(flow, other) if limit is None else limit
                assert gap <= self._limits[pair] + _ROUNDING
                assert gap <= self._scene.gap

    def _close(self, request_id: str) -> int:
        """A request is charged for no longer; what it was, 0 if it was not."""
        if request_id not in self._charges:
            return 0
        name, cost = self._charges.pop(request_id)
        self._open[name] -= cost
        return cost

    def _pay(self, client: Client, tokens: int) -> tuple[Flow, str]:
        request = client.request
        name = (request.band, request.model), request.tenant
        if name in self._keys:
            self._keys[name] += tokens / self._weight(request.tenant)
        return name

    def _running(self, flow: Flow, tenant: str) -> float:
        return self._open[flow, tenant] / self._weight(tenant)

    def _weight(self, tenant: str) -> float:
        return self._scene.weight(tenant)
