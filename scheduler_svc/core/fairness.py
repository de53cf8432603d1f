"""Who of a flow's tenants goes next: weighted virtual token counters.

Rule: a flow's next tenant is the waiting one with the smallest key, its virtual time: tokens that
it was served and tokens that its running requests may still use, divided by its weight. A grant
charges the estimate (prompt + w x max output), so that many grants at one instant are spread; the
end replaces it by what was really used: of the prompt what no cache had, and w x output. (Where a
request will run, and what is cached there, is not known while it waits for its turn.)
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
idle ones make room for others beyond ``max_accounts``, the longest idle first. The flow then stands
no lower than what was forgotten: who comes back would else start anew each time.

Bound: let L be the largest request / the smaller weight, and C what the ends of one tenant's
running requests can take off its account at most (charged - used, / weight). Then the keys of two
tenants that always wait never differ by more than Q + L + C. With one running request for each
tenant, or with exact estimates, C <= L and this is Q + 2 L.
"""

from collections.abc import Mapping, Set

from scheduler_svc.core.recency import Link, Recency

FlowName = tuple[int, str]  # (band, model)


class Account(Link):
    """What one tenant got in one flow."""

    __slots__ = ("flow", "is_waiting", "num_open_tokens", "served", "tenant", "weight")

    def __init__(self, flow: FlowName, tenant: str, weight: float, served: float) -> None:
        super().__init__()
        self.flow = flow
        self.tenant = tenant
        self.weight = weight
        # virtual time: tokens really used / weight, plus what it was lifted by; never falls
        self.served = served
        # charged for running requests and not yet corrected; never below 0
        self.num_open_tokens = 0
        # between a lift and the next ``leave``
        self.is_waiting = False

    @property
    def key(self) -> float:
        """Virtual time, with what runs at its estimate."""
        return self.served + self.num_open_tokens / self.weight


class Ledger:
    """The accounts of one flow, by tenant; never empty."""

    __slots__ = ("accounts", "level")

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        # the virtual time that a newcomer starts at
        self.level = 0.0


class Fairness:
    """The accounts of all flows. Every operation is O(1)."""

    def __init__(
        self, weights: Mapping[str, float], quantum_tokens: int, max_accounts: int
    ) -> None:
        assert all(weight > 0 for weight in weights.values())
        assert quantum_tokens >= 0
        assert max_accounts > 0
        # tenants that are not named weigh 1
        self._weights = dict(weights)
        self._quantum_tokens = quantum_tokens
        self._max_accounts = max_accounts
        self._ledgers: dict[FlowName, Ledger] = {}
        # at most max_accounts, unless more are in use
        self._num_accounts = 0
        # of tenants that neither wait nor have something charged
        self._idle = Recency()

    def __len__(self) -> int:
        return self._num_accounts

    def lift(self, flow: FlowName, tenant: str) -> float:
        """A tenant that had nobody waiting in the flow has now. Gives its key."""
        ledger = self._ledger(flow)
        account = self._use(ledger, flow, tenant)
        account.is_waiting = True
        if account.served < ledger.level:
            account.served = ledger.level
        return account.key

    def leave(self, flow: FlowName, tenant: str) -> None:
        """A tenant that was lifted has nobody waiting in the flow any more."""
        account = self._ledgers[flow].accounts[tenant]
        account.is_waiting = False
        if not account.num_open_tokens:
            self._rest(account)

    def charge(self, flow: FlowName, tenant: str, tokens: int) -> float:
        """A request was granted; ``tokens``, at least 1, is the most that it is expected to use.
        Gives the new key."""
        assert tokens > 0
        ledger = self._ledger(flow)
        account = self._use(ledger, flow, tenant)
        if account.served > ledger.level:
            ledger.level = account.served
        account.num_open_tokens += tokens
        return account.key

    def correct(self, flow: FlowName, tenant: str, charged_tokens: int, used_tokens: int) -> float:
        """Of what was charged, ``charged_tokens`` are settled: ``used_tokens`` were used, 0 of what
        was given back without a result. Gives the new key."""
        account = self._ledgers[flow].accounts[tenant]
        assert 0 <= charged_tokens <= account.num_open_tokens
        assert used_tokens >= 0
        account.num_open_tokens -= charged_tokens
        account.served += used_tokens / account.weight
        if not account.num_open_tokens and not account.is_waiting:
            self._rest(account)
        return account.key

    def key(self, flow: FlowName, tenant: str) -> float:
        """Virtual time: the waiting tenant with the smallest is next; ties go by arrival. Of one
        that does not wait, with what it would be lifted by if it did."""
        ledger = self._ledgers.get(flow)
        if ledger is None:
            return 0.0
        account = ledger.accounts.get(tenant)
        if account is None:
            return ledger.level
        if account.is_waiting:
            return account.key
        return max(ledger.level, account.served) + account.num_open_tokens / account.weight

    def may_jump(self, key: float, first: float) -> bool:
        """Whether a pick that saves work, of a tenant with this key, may pass the first one's."""
        return key - first <= self._quantum_tokens

    def check(
        self, open_tokens: Mapping[tuple[FlowName, str], int], waiting: Set[tuple[FlowName, str]]
    ) -> None:
        """Assert that the accounts in use are these, what runs at its charge; for tests."""
        accounts = {
            (flow, tenant): account
            for flow, ledger in self._ledgers.items()
            for tenant, account in ledger.accounts.items()
        }
        assert {name for name, a in accounts.items() if a.is_waiting} == waiting
        assert {n: a.num_open_tokens for n, a in accounts.items() if a.num_open_tokens} == dict(
            open_tokens
        )
        idle = {(a.flow, a.tenant) for a in self._idle.all() if isinstance(a, Account)}
        assert idle == accounts.keys() - waiting - open_tokens.keys()
        assert len(self) == len(accounts)
        assert not idle or len(self) <= self._max_accounts
        assert all(ledger.accounts for ledger in self._ledgers.values())

    def _ledger(self, flow: FlowName) -> Ledger:
        ledger = self._ledgers.get(flow)
        if ledger is None:
            ledger = self._ledgers[flow] = Ledger()
        return ledger

    def _use(self, ledger: Ledger, flow: FlowName, tenant: str) -> Account:
        """The account, old or new, which is not idle any more."""
        account = ledger.accounts.get(tenant)
        if account is None:
            weight = self._weights.get(tenant, 1.0)
            account = ledger.accounts[tenant] = Account(flow, tenant, weight, ledger.level)
            self._num_accounts += 1
            self._forget_idle()
        elif account.older is not None:
            self._idle.remove(account)
        return account

    def _rest(self, account: Account) -> None:
        """The account is not in use any more."""
        self._idle.used(account)
        self._forget_idle()

    def _forget_idle(self) -> None:
        while self._num_accounts > self._max_accounts:
            account = self._idle.oldest
            if not isinstance(account, Account):
                return  # all are in use
            self._idle.remove(account)
            self._num_accounts -= 1
            ledger = self._ledgers[account.flow]
            del ledger.accounts[account.tenant]
            if account.served > ledger.level:
                ledger.level = account.served
            if not ledger.accounts:
                del self._ledgers[account.flow]
