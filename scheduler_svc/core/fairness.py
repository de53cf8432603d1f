"""Who of a flow's tenants goes next: weighted virtual token counters.

Rule: a flow's next tenant is the waiting one with the smallest key, its virtual time: tokens that
it was served and tokens that its running requests may still use, divided by its weight. A grant
charges the estimate (uncached prompt + w x max output), so that many grants at one instant are
spread too; progress and end replace estimates by what was really used.
Source: VTC, Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, section 4.1,
with the lift of start-time fair queueing (Goyal et al., SIGCOMM 1996).

Lift: who comes back must not cash in the time that it was away, so its account rises to where the
flow stands: the tokens really served to the tenant that was granted last. Estimates are left out
of that level on purpose. They are mostly far too high (max_tokens), and a newcomer lifted to them
would wait for all the tokens that others never use.

Quantum: a pick that saves work (warm model, shared prefix) may pass the first tenant if its key is
at most quantum_tokens larger (``may_jump``).

Memory: the account of a tenant that waits, or whose requests run, is in use: its flow is sorted by
it, and what was charged must find it again. Such accounts are as many as live requests at most;
idle ones make room for others beyond ``max_tenants``, the longest idle first.

Bound: let L be the largest request / the smaller weight, and C what the ends of one tenant's
running requests can take off its account at most (charged - used, / weight). Then the keys of two
tenants that always wait never differ by more than Q + L + C. With one running request for each
tenant, or with exact estimates, C <= L and this is Q + 2 L.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping, Set
from dataclasses import dataclass

FlowName = tuple[int, str]  # (band, model)


@dataclass(slots=True)
class Account:
    """What one tenant got in one flow."""

    weight: float
    # virtual time: tokens really used / weight, plus what it was lifted by; never falls
    served: float
    # charged for running requests and not yet corrected; never below 0
    num_open_tokens: int = 0
    # between a lift and the next ``leave``
    is_waiting: bool = False


class Fairness:
    """The accounts of all flows. Every operation is O(1)."""

    def __init__(self, weights: Mapping[str, float], quantum_tokens: int, max_tenants: int) -> None:
        assert all(weight > 0 for weight in weights.values())
        assert quantum_tokens >= 0
        assert max_tenants > 0
        # tenants that are not named weigh 1
        self._weights = dict(weights)
        self._quantum_tokens = quantum_tokens
        self._max_tenants = max_tenants
        # of tenants that wait, or have something charged
        self._busy: dict[tuple[FlowName, str], Account] = {}
        # of the others, longest idle first; with the busy ones at most max_tenants, if any
        self._idle: OrderedDict[tuple[FlowName, str], Account] = OrderedDict()
        # the virtual time that a newcomer starts at; exactly the flows that have accounts
        self._levels: dict[FlowName, float] = {}
        self._num_accounts: dict[FlowName, int] = {}

    def __len__(self) -> int:
        return len(self._busy) + len(self._idle)

    def lift(self, flow: FlowName, tenant: str) -> None:
        """A tenant that had nobody waiting in the flow has now; call it before ``key``."""
        account = self._use(flow, tenant)
        account.is_waiting = True
        if account.served < self._levels[flow]:
            account.served = self._levels[flow]

    def leave(self, flow: FlowName, tenant: str) -> None:
        """A tenant that was lifted has nobody waiting in the flow any more."""
        account = self._busy[flow, tenant]
        account.is_waiting = False
        if not account.num_open_tokens:
            self._rest(flow, tenant)

    def charge(self, flow: FlowName, tenant: str, tokens: int) -> float:
        """A request was granted; ``tokens``, at least 1, is the most that it is expected to use.
        Gives the new key."""
        assert tokens > 0
        account = self._use(flow, tenant)
        if account.served > self._levels[flow]:
            self._levels[flow] = account.served
        account.num_open_tokens += tokens
        return account.served + account.num_open_tokens / account.weight

    def correct(self, flow: FlowName, tenant: str, charged_tokens: int, used_tokens: int) -> float:
        """Of what was charged, ``charged_tokens`` are settled: ``used_tokens`` were used. Gives the
        new key.

        Progress of n tokens: (n, n). End: (what is left of the charge, used since the last
        progress). Given back without result: (what is left, 0).
        """
        account = self._busy[flow, tenant]
        assert 0 <= charged_tokens <= account.num_open_tokens
        assert used_tokens >= 0
        account.num_open_tokens -= charged_tokens
        account.served += used_tokens / account.weight
        if not account.num_open_tokens and not account.is_waiting:
            self._rest(flow, tenant)
        return account.served + account.num_open_tokens / account.weight

    def key(self, flow: FlowName, tenant: str) -> float:
        """Virtual time: the waiting tenant with the smallest is next; ties go by arrival. Of one
        that does not wait, with what it would be lifted by if it did."""
        account = self._busy.get((flow, tenant))
        if account is not None and account.is_waiting:
            return account.served + account.num_open_tokens / account.weight
        level = self._levels.get(flow, 0.0)
        account = account or self._idle.get((flow, tenant))
        if account is None:
            return level
        return max(level, account.served) + account.num_open_tokens / account.weight

    def may_jump(self, key: float, first: float) -> bool:
        """Whether a pick that saves work, of a tenant with this key, may pass the first one's."""
        return key - first <= self._quantum_tokens

    def check(
        self, open_tokens: Mapping[tuple[FlowName, str], int], waiting: Set[tuple[FlowName, str]]
    ) -> None:
        """Assert that the busy accounts are these, what runs at its charge; for tests."""
        assert {name for name, a in self._busy.items() if a.is_waiting} == waiting
        assert {n: a.num_open_tokens for n, a in self._busy.items() if a.num_open_tokens} == dict(
            open_tokens
        )
        assert set(self._busy) == waiting | set(open_tokens)
        assert not self._idle or len(self) <= self._max_tenants
        flows = Counter(flow for flow, _ in [*self._busy, *self._idle])
        assert self._num_accounts == flows
        assert set(self._levels) == set(flows)

    def _use(self, flow: FlowName, tenant: str) -> Account:
        """The account, old or new, among the busy ones."""
        name = (flow, tenant)
        account = self._busy.get(name)
        if account is not None:
            return account
        account = self._idle.pop(name, None)
        if account is None:
            account = Account(self._weights.get(tenant, 1.0), self._levels.setdefault(flow, 0.0))
            self._num_accounts[flow] = self._num_accounts.get(flow, 0) + 1
        self._busy[name] = account
        self._forget_idle()
        return account

    def _rest(self, flow: FlowName, tenant: str) -> None:
        """The account is not in use any more."""
        name = (flow, tenant)
        self._idle[name] = self._busy.pop(name)
        self._forget_idle()

    def _forget_idle(self) -> None:
        while self._idle and len(self._busy) + len(self._idle) > self._max_tenants:
            (flow, _), _ = self._idle.popitem(last=False)
            self._num_accounts[flow] -= 1
            if not self._num_accounts[flow]:
                del self._num_accounts[flow], self._levels[flow]
