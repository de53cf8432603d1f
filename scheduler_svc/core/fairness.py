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

Bound: let L be the largest request / the smaller weight, and C what the ends of one tenant's
running requests can take off its account at most (charged - used, / weight). Then the keys of two
tenants that always wait never differ by more than Q + L + C. With one running request for each
tenant, or with exact estimates, C <= L and this is Q + 2 L.
"""

from collections import OrderedDict
from collections.abc import Mapping
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

    @property
    def key(self) -> float:
        """Virtual time, with what runs at its estimate."""
        return self.served + self.num_open_tokens / self.weight


class Fairness:
    """The accounts of all flows. Every operation is O(1).

    At most ``max_tenants`` accounts are kept, over all flows; the one longest without a lift or a
    charge is forgotten first and starts again at its flow's level.
    """

    def __init__(self, weights: Mapping[str, float], quantum_tokens: int, max_tenants: int) -> None:
        assert all(weight > 0 for weight in weights.values())
        assert quantum_tokens >= 0
        assert max_tenants > 0
        # tenants that are not named weigh 1
        self._weights = dict(weights)
        self._quantum_tokens = quantum_tokens
        self._max_tenants = max_tenants
        # longest unused first; at most max_tenants
        self._accounts: OrderedDict[tuple[FlowName, str], Account] = OrderedDict()
        # the virtual time that a newcomer starts at; exactly the flows that have accounts
        self._levels: dict[FlowName, float] = {}
        self._num_accounts: dict[FlowName, int] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def lift(self, flow: FlowName, tenant: str) -> None:
        """A tenant that had nobody waiting in the flow has now; call it before ``key``."""
        account = self._touch(flow, tenant)
        if account.served < self._levels[flow]:
            account.served = self._levels[flow]

    def charge(self, flow: FlowName, tenant: str, tokens: int) -> float:
        """A request was granted; ``tokens`` is the most that it is expected to use. Gives the new
        key."""
        assert tokens >= 0
        account = self._touch(flow, tenant)
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
        assert charged_tokens >= 0
        assert used_tokens >= 0
        account = self._accounts.get((flow, tenant))
        if account is None:  # forgotten since it was charged
            return self._levels.get(flow, 0.0)
        account.num_open_tokens = max(0, account.num_open_tokens - charged_tokens)
        account.served += used_tokens / account.weight
        return account.served + account.num_open_tokens / account.weight

    def key(self, flow: FlowName, tenant: str) -> float:
        """Virtual time: the waiting tenant with the smallest is next; ties go by arrival."""
        account = self._accounts.get((flow, tenant))
        return self._levels.get(flow, 0.0) if account is None else account.key

    def may_jump(self, key: float, first: float) -> bool:
        """Whether a pick that saves work, of a tenant with this key, may pass the first one's."""
        return key - first <= self._quantum_tokens

    def _touch(self, flow: FlowName, tenant: str) -> Account:
        name = (flow, tenant)
        account = self._accounts.get(name)
        if account is not None:
            self._accounts.move_to_end(name)
            return account
        account = Account(self._weights.get(tenant, 1.0), self._levels.setdefault(flow, 0.0))
        self._accounts[name] = account
        self._num_accounts[flow] = self._num_accounts.get(flow, 0) + 1
        if len(self._accounts) > self._max_tenants:
            self._forget_oldest()
        return account

    def _forget_oldest(self) -> None:
        (flow, _), _ = self._accounts.popitem(last=False)
        self._num_accounts[flow] -= 1
        if not self._num_accounts[flow]:
            del self._num_accounts[flow], self._levels[flow]
