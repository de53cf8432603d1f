"""Tenants of a flow in the whole core: order, places, what comes back, what ends early."""

from scheduler_svc.core.messages import LeaseEnded, LeaseOutcome
from tests.core.scheduler.helpers import EPOCH, Driver, granted


def busy(**settings: int) -> Driver:
    """One slot, one request running."""
    driver = Driver(**settings)
    driver.attach()
    driver.submit("running", tenant="nobody")
    return driver


def drain(driver: Driver, last: str = "running") -> list[str]:
    """End one after another; the order of the grants."""
    order = []
    while sent := granted(driver.end(last)):
        [(last, _)] = sent
        order.append(last)
    return order


def test_a_newcomer_does_not_wait_for_the_backlog_of_another() -> None:
    driver = busy()
    for number in range(5):
        driver.submit(f"a{number}", tenant="a")
    driver.submit("b0", tenant="b")
    driver.submit("b1", tenant="b")
    assert [driver.status(name).position for name in ("a0", "b0", "a1", "b1", "a2")] == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip
    assert drain(driver) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]


def test_weights_are_shares() -> None:
    driver = Driver(tenant_weights={"a": 3.0})
    driver.attach()
    driver.submit("running", tenant="nobody")
    for number in range(40):
        driver.submit(f"a{number}", tenant="a")
        driver.submit(f"b{number}", tenant="b")
    order = drain_all(driver)[:40]
    assert sum(name.startswith("a") for name in order) in (29, 30, 31)


def drain_all(driver: Driver, last: str = "running") -> list[str]:
    """The same, with all tokens used."""
    order: list[str] = []
    while True:
        attempt = driver.attempts[last]
        ref = ("e1", 1, last, EPOCH, attempt)
        ended = LeaseEnded(*ref, LeaseOutcome.COMPLETED, num_generated_tokens=20)
        if not (sent := granted(driver.handle(ended))):
            return order
        [(last, _)] = sent
        order.append(last)


def test_more_tenants_wait_than_accounts_are_remembered() -> None:
    """Whoever waits keeps its place, and whoever runs its charge."""
    driver = Driver(max_fair_accounts=1)
    driver.attach(num_slots=2)
    for name in ("a0", "a1", "a2", "a3"):
        driver.submit(name, tenant="a")
    for name in ("b0", "b1"):
        driver.submit(name, tenant="b")
    driver.submit("c0", tenant="c")
    assert granted(driver.end("a0")) == [("b0", "e1")]
    driver.cancel("c0", tenant="c")
    driver.submit("c1", tenant="c")
    names = ("a2", "c1", "b1", "a3")
    order = sorted(names, key=lambda name: driver.status(name).position)
    running, seen = ["a1", "b0"], []
    while running:
        for name, _ in granted(driver.end(running.pop(0))):
            running.append(name)
            seen.append(name)
    assert set(seen) == set(names)
    assert seen[0] == order[0]
    assert len(driver.core._state.queue.fairness) == 1


def test_who_was_forgotten_does_not_come_back_for_nothing() -> None:
    """a and c take turns and are forgotten in between, while b, who had service, waits."""
    driver = Driver(max_fair_accounts=1)
    driver.attach(num_slots=1)
    driver.submit("b0", tenant="b")
    driver.submit("a0", tenant="a")
    driver.submit("b1", tenant="b")
    driver.end("b0")
    for number in range(60):
        tenant, other = "ac" if number % 2 == 0 else "ca"
        driver.submit(f"{other}{number + 1}", tenant=other)
        [(name, _)] = granted(driver.end(f"{tenant}{number}"))
        if name == "b1":
            return
    raise AssertionError("b never had its turn")


def test_what_comes_back_is_first_and_paid_for_once() -> None:
    driver = busy()
    driver.submit("a0", tenant="a")
    driver.submit("a1", tenant="a")
    driver.submit("b0", tenant="b")
    driver.end("running")
    sent = driver.end("a0", outcome=LeaseOutcome.RETURNED)
    assert granted(sent) == [("a0", "e1")]
    assert driver.core.decisions["position_rose.requeued"] == 1
    assert drain(driver, "a0") == ["b0", "a1"]


def test_rows_of_the_queue_are_numbered_as_they_will_be_granted() -> None:
    """b1 came first of all, but goes behind b2, which came last. So a1 goes before both, unless b2
    gives up: its client is told that b1 may go before it, and its position never rises."""
    driver = Driver()
    driver.attach(models="AB")
    driver.submit("b0", "B", tenant="served")
    driver.submit("b1", "B", tenant="served")
    driver.submit("a1", "A", tenant="new")
    driver.submit("b2", "B", tenant="new")
    rows = driver.core.snapshot(driver.now_ms, 3).queue
    assert [(r.request_id, r.status.position) for r in rows] == [("a1", 0), ("b2", 1), ("b1", 2)]
    assert [driver.status(name).position for name in ("a1", "b2", "b1")] == [1, 1, 2]
    driver.cancel("b2", tenant="new")
    assert [row.request_id for row in driver.core.snapshot(driver.now_ms, 3).queue] == ["b1", "a1"]
    assert driver.status("a1").position == 1


def test_positions_count_down_to_the_grant_without_rising() -> None:
    driver = busy()
    names = [f"{tenant}{number}" for number in range(6) for tenant in "abc"]
    for name in names:
        driver.submit(name, tenant=name[0])
    before = {name: driver.status(name).position for name in names}
    assert sorted(before.values()) == list(range(len(names)))
    last = "running"
    for expected in sorted(names, key=lambda name: before[name]):
        [(last, _)] = granted(driver.end(last))
        assert last == expected
        for name in names:
            if driver.core.is_live(name) and name != last:
                position = driver.status(name).position
                assert position <= before[name]
                before[name] = position


def test_a_refund_is_logged_however_far_behind_the_tenants_are_that_it_reorders() -> None:
    """Their positions rise, and the decision log has to say why."""
    driver = Driver(has_decision_log=True, locality_quantum_tokens=0)
    driver.attach(num_slots=4)
    for name in ("b0", "b1", "c0", "x0", "b2", "c1", "x1"):
        tokens = 1 if name.startswith("x") else 30 if name.startswith("c") else 20
        driver.submit(name, tenant=name[0], max_tokens=tokens)
    order = [driver.status(name).position for name in ("x1", "c1", "b2")]
    assert order == [0, 1, 2]
    ended = LeaseEnded("e1", 1, "b0", EPOCH, 1, LeaseOutcome.COMPLETED, num_generated_tokens=0)
    kinds = [decision.kind for decision in driver.core.handle(ended, driver.now_ms).decisions]
    assert "refund" in kinds


def two_tenants(quantum: int) -> Driver:
    """b's session was served on e1; now a0 is first and b0 of that session second."""
    driver = Driver(locality_quantum_tokens=quantum)
    driver.attach()
    driver.submit("before", tenant="b", session_id="s")
    driver.submit("a0", tenant="a")
    driver.submit("b0", tenant="b", session_id="s")
    return driver


def test_a_cached_session_may_jump_within_the_quantum() -> None:
    driver = two_tenants(1_000)
    assert driver.status("a0").position == 0
    assert granted(driver.end("before")) == [("b0", "e1")]
    assert driver.core.decisions["position_rose.locality"] == 1
    assert granted(driver.end("b0")) == [("a0", "e1")]


def test_no_quantum_no_jump() -> None:
    assert granted(two_tenants(0).end("before")) == [("a0", "e1")]


def test_jumps_end_when_the_quantum_is_used_up() -> None:
    """50 tokens a request: with a quantum of 120 b may lead a by no more than that."""
    driver = Driver(locality_quantum_tokens=120)
    driver.attach()
    driver.submit("running", tenant="b", session_id="s")
    for number in range(10):
        driver.submit(f"a{number}", tenant="a")
        driver.submit(f"b{number}", tenant="b", session_id="s")
    order = drain_all(driver)
    lead = most = 1
    for name in order:
        lead += 1 if name.startswith("b") else -1
        most = max(most, lead)
    assert 1 < most <= 1 + 120 // 50 + 1


def test_a_head_is_passed_so_often_and_no_more() -> None:
    """Whoever passes goes with the age of the head, so cheap ones must not do so for ever."""
    driver = Driver(locality_quantum_tokens=1_000_000, locality_max_passes=3)
    driver.attach()
    driver.submit("running", tenant="b", session_id="s")
    for number in range(10):
        driver.submit(f"a{number}", tenant="a")
        driver.submit(f"b{number}", tenant="b", session_id="s")
    order = drain_all(driver)
    assert order[:8] == ["b0", "b1", "b2", "a0", "b3", "b4", "b5", "a1"]


def test_a_claim_goes_over_when_the_end_of_a_lease_changes_who_is_first() -> None:
    driver = Driver()
    driver.attach("e1", 2, "AB")
    driver.submit("x0", tenant="x", num_prompt_tokens=100)
    driver.end("x0", "e1")
    driver.attach("e2", 1, "A")
    driver.submit("b0", "B")
    driver.submit("b1", "B")
    driver.submit("y0", tenant="y", max_tokens=1_000)
    driver.submit("x1", tenant="x", num_samples=2)
    driver.submit("y1", tenant="y", num_samples=2)
    driver.end("b0", "e1")
    claims = driver.core._state.fleet.reservations
    assert claims["A"].request_id == "x1"
    driver.drain("e2")
    driver.end("y0", "e2")
    assert driver.status("y1").position < driver.status("x1").position
    assert claims["A"].request_id == "y1"


def test_nobody_pays_for_more_than_was_charged_whatever_an_executor_says() -> None:
    driver = Driver(locality_quantum_tokens=0)
    driver.attach()
    for name in ("a0", "a1", "b0", "b1", "b2", "b3"):
        driver.submit(name, tenant=name[0])
    ended = LeaseEnded("e1", 1, "a0", EPOCH, 1, LeaseOutcome.COMPLETED, num_generated_tokens=10**9)
    [(first, _)] = granted(driver.handle(ended))
    assert [first, *drain_all(driver, first)] == ["b0", "a1", "b1", "b2", "b3"]


def test_a_head_whose_own_cache_is_there_is_not_passed() -> None:
    driver = Driver(locality_quantum_tokens=1_000)
    driver.attach()
    driver.submit("before a", tenant="a", session_id="s")
    driver.submit("before b", tenant="b", session_id="s")
    driver.end("before a")
    driver.submit("a0", tenant="a", session_id="s")
    driver.submit("b0", tenant="b", session_id="s")
    assert driver.status("a0").position == 0
    assert granted(driver.end("before b")) == [("a0", "e1")]


def test_what_was_cached_costs_its_tenant_nothing() -> None:
    """a's prompts of 60 tokens are in the cache, b's of 50 are not, and their outputs are alike."""
    driver = Driver(locality_quantum_tokens=0)
    driver.attach()
    driver.submit("running", tenant="nobody")
    for number in range(12):
        driver.submit(f"a{number}", tenant="a", num_prompt_tokens=60, max_tokens=5)
        driver.submit(f"b{number}", tenant="b", num_prompt_tokens=50, max_tokens=5)
    last, order = "running", []
    for _ in range(12):
        cached = 60 if last.startswith("a") else 0
        ref = ("e1", 1, last, EPOCH, driver.attempts[last])
        ended = LeaseEnded(*ref, LeaseOutcome.COMPLETED, 5, num_cached_tokens=cached)
        [(last, _)] = granted(driver.handle(ended))
        order.append(last[0])
    assert order.count("b") == 2, "10 tokens against 60"


def test_nobody_starves_behind_requests_that_use_nothing() -> None:
    """a's prompts are in the cache, and it gives up before the first token. b had service."""
    driver = Driver(locality_quantum_tokens=0)
    driver.attach()
    driver.submit("b0", tenant="b")
    driver.end("b0")
    driver.submit("a0", tenant="a")
    driver.submit("b1", tenant="b")
    driver.submit("a1", tenant="a")
    for number in range(1, 60):
        last = f"a{number - 1}"
        driver.cancel(last, "a")
        driver.submit(f"a{number + 1}", tenant="a")
        ref = ("e1", 1, last, EPOCH, driver.attempts[last])
        ended = LeaseEnded(*ref, LeaseOutcome.REVOKED, 0, num_cached_tokens=10)
        [(granted_now, _)] = granted(driver.handle(ended))
        if granted_now == "b1":
            return
    raise AssertionError("b never had its turn")


def test_who_goes_first_in_its_flow_does_not_ride_on_the_age_of_those_behind() -> None:
    """a's old request stands behind a light tenant's, that keep coming, and b's for another model
    is older than any of those but the first."""
    driver = Driver(aging_equalization_ms=100, locality_quantum_tokens=0)
    driver.attach(models="AB")
    driver.submit("dear", tenant="a", num_prompt_tokens=10_000)
    driver.submit("a", tenant="a")
    driver.advance(1_000)
    driver.submit("b", "B", tenant="b")
    for number in range(4):
        driver.advance(1_000)
        driver.submit(f"light{number}", tenant="light")
    assert granted(driver.end("dear")) == [("light0", "e1")]
    driver.advance(1_000)
    assert granted(driver.end("light0")) == [("b", "e1")]
    driver.advance(1_000)
    assert granted(driver.end("b")) == [("light1", "e1")]
