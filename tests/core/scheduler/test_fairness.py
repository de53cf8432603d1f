"""Virtual token counters: order, lift, weights, the quantum, and the bound on the gap."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.core.fairness import Fairness

FLOW = (0, "A")


def fair(
    weights: dict[str, float] | None = None, quantum_tokens: int = 0, max_accounts: int = 100
) -> Fairness:
    return Fairness(weights or {}, quantum_tokens, max_accounts)


def serve(fairness: Fairness, tenant: str, tokens: int) -> None:
    """A request is granted and ends with what was expected."""
    fairness.charge(FLOW, tenant, tokens)
    fairness.correct(FLOW, tenant, tokens, tokens)


def next_of(fairness: Fairness, *tenants: str) -> str:
    return min(tenants, key=lambda tenant: fairness.key(FLOW, tenant))


def test_who_had_less_goes_next() -> None:
    fairness = fair()
    for tenant in "ab":
        fairness.lift(FLOW, tenant)
    assert fairness.key(FLOW, "a") == fairness.key(FLOW, "b")
    fairness.charge(FLOW, "a", 10)
    assert next_of(fairness, "a", "b") == "b"
    fairness.charge(FLOW, "b", 30)
    assert next_of(fairness, "a", "b") == "a"


def test_a_correction_gives_back_what_was_not_used() -> None:
    fairness = fair()
    fairness.lift(FLOW, "a")
    fairness.charge(FLOW, "a", 100)
    fairness.correct(FLOW, "a", 30, 30)
    assert fairness.key(FLOW, "a") == 100
    fairness.correct(FLOW, "a", 70, 5)
    assert fairness.key(FLOW, "a") == 35


def test_flows_have_accounts_of_their_own() -> None:
    fairness = fair()
    fairness.charge(FLOW, "a", 100)
    assert fairness.key((1, "A"), "a") == fairness.key((0, "B"), "a") == 0


def test_a_weight_of_two_gets_twice_the_tokens() -> None:
    fairness = fair({"big": 2.0})
    num_served = dict.fromkeys(("big", "small"), 0)
    for tenant in num_served:
        fairness.lift(FLOW, tenant)
    for _ in range(300):
        tenant = next_of(fairness, "big", "small")
        serve(fairness, tenant, 7)
        num_served[tenant] += 1
    assert num_served == {"big": 200, "small": 100}


def test_absence_earns_nothing() -> None:
    fairness = fair()
    for tenant in "ab":
        fairness.lift(FLOW, tenant)
        serve(fairness, tenant, 10)
    for _ in range(1_000):
        serve(fairness, "a", 10)
    fairness.lift(FLOW, "b")
    assert fairness.key(FLOW, "a") - fairness.key(FLOW, "b") == 10


def test_a_lift_takes_nothing_from_who_is_ahead() -> None:
    fairness = fair()
    fairness.lift(FLOW, "a")
    serve(fairness, "a", 500)
    fairness.lift(FLOW, "a")
    assert fairness.key(FLOW, "a") == 500


def test_a_newcomer_does_not_pay_for_the_estimates_of_others() -> None:
    """100 requests run that say max_tokens = 4,096 and use 10."""
    fairness = fair()
    fairness.lift(FLOW, "old")
    for _ in range(100):
        fairness.charge(FLOW, "old", 4_096)
    fairness.lift(FLOW, "new")
    for _ in range(100):
        fairness.correct(FLOW, "old", 4_096, 10)
    assert fairness.key(FLOW, "new") <= fairness.key(FLOW, "old") == 1_000


def test_a_jump_is_worth_the_quantum_and_no_more() -> None:
    fairness = fair(quantum_tokens=50)
    for tenant in "ab":
        fairness.lift(FLOW, tenant)
    serve(fairness, "a", 50)
    assert fairness.may_jump(fairness.key(FLOW, "a"), fairness.key(FLOW, "b"))
    serve(fairness, "a", 1)
    assert not fairness.may_jump(fairness.key(FLOW, "a"), fairness.key(FLOW, "b"))


def visit(fairness: Fairness, tenant: str, tokens: int, flow: tuple[int, str] = FLOW) -> None:
    """One request of a tenant comes, is served and leaves nothing behind."""
    fairness.lift(flow, tenant)
    fairness.charge(flow, tenant, tokens)
    fairness.leave(flow, tenant)
    fairness.correct(flow, tenant, tokens, tokens)


def test_idle_accounts_are_bounded_and_the_forgotten_start_at_the_level() -> None:
    fairness = fair(max_accounts=3)
    for number in range(10):
        visit(fairness, f"t{number}", 5)
        visit(fairness, f"t{number}", 5)
    assert len(fairness) == 3
    level = fairness.key(FLOW, "t0")
    fairness.lift(FLOW, "t0")
    assert fairness.key(FLOW, "t0") == level == fairness.key(FLOW, "t9") - 5


def test_an_account_in_use_is_never_forgotten() -> None:
    fairness = fair(max_accounts=1)
    fairness.lift(FLOW, "waits")
    fairness.charge(FLOW, "waits", 40)
    fairness.lift(FLOW, "runs")
    fairness.charge(FLOW, "runs", 30)
    fairness.leave(FLOW, "runs")
    for number in range(5):
        visit(fairness, f"t{number}", 100)
    assert len(fairness) == 2
    assert fairness.key(FLOW, "waits") == 40
    assert fairness.correct(FLOW, "runs", 30, 20) == 20
    assert fairness.correct(FLOW, "waits", 40, 10) == 10
    assert len(fairness) == 1, "what runs no more is forgotten, who waits is not"


def test_an_end_settles_the_charge_that_it_is_the_end_of() -> None:
    """One that is forgotten in between would have it settle against another request's charge."""
    fairness = fair(max_accounts=1)
    fairness.charge(FLOW, "a", 70)
    visit(fairness, "b", 1)
    fairness.charge(FLOW, "a", 40)
    fairness.correct(FLOW, "a", 70, 0)
    assert fairness.key(FLOW, "a") == 1 + 40, "the flow stands where b stood"


def test_who_does_not_wait_is_seen_where_it_would_stand() -> None:
    fairness = fair()
    visit(fairness, "away", 10)
    for _ in range(5):
        visit(fairness, "busy", 10)
    expected = fairness.key(FLOW, "away")
    fairness.lift(FLOW, "away")
    assert fairness.key(FLOW, "away") == expected == 40


def test_a_flow_without_accounts_is_forgotten() -> None:
    fairness = fair(max_accounts=2)
    visit(fairness, "a", 100)
    visit(fairness, "a", 100)
    assert fairness.key(FLOW, "new") == 100
    visit(fairness, "a", 1, (0, "B"))
    visit(fairness, "b", 1, (0, "B"))
    assert fairness.key(FLOW, "new") == 0


sizes = st.lists(st.integers(1, 1_000), min_size=1, max_size=20)


@given(
    requests=st.fixed_dictionaries({"a": sizes, "b": sizes}),
    used=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    jumps=st.lists(st.booleans(), min_size=1, max_size=20),
    weight=st.sampled_from((0.5, 1.0, 3.0)),
    quantum=st.sampled_from((0, 1, 700)),
    num_slots=st.integers(1, 6),
    is_exact=st.booleans(),
)
def test_the_gap_of_two_tenants_that_always_wait_is_bounded(
    requests: dict[str, list[int]],
    used: list[float],
    jumps: list[bool],
    weight: float,
    quantum: int,
    num_slots: int,
    is_exact: bool,
) -> None:
    """Q + 2 L with exact estimates or one request at a time, Q + L + C in general."""
    fairness = fair({"a": weight}, quantum)
    for tenant in "ab":
        fairness.lift(FLOW, tenant)
    largest = max(max(requests["a"]) / weight, max(requests["b"]))
    running: deque[tuple[str, int]] = deque()
    most_taken_off = 0.0

    def check() -> None:
        gap = abs(fairness.key(FLOW, "a") - fairness.key(FLOW, "b"))
        assert gap <= quantum + largest + (0.0 if is_exact else most_taken_off) + 1e-6
        if is_exact or num_slots == 1:
            assert gap <= quantum + 2 * largest + 1e-6

    for number in range(60):
        (key, first), (other_key, other) = sorted((fairness.key(FLOW, name), name) for name in "ab")
        wants_jump = jumps[number % len(jumps)]
        pick = other if wants_jump and fairness.may_jump(other_key, key) else first
        tokens = requests[pick][number % len(requests[pick])]
        fairness.charge(FLOW, pick, tokens)
        running.append((pick, tokens))
        for tenant, share in (("a", weight), ("b", 1.0)):
            open_tokens = sum(size for name, size in running if name == tenant)
            most_taken_off = max(most_taken_off, open_tokens / share)
        check()
        if len(running) == num_slots:
            tenant, tokens = running.popleft()
            share = 1.0 if is_exact else used[number % len(used)]
            fairness.correct(FLOW, tenant, tokens, round(tokens * share))
            check()
