"""The attach session when streams come and go: adoption, orphans, drains."""

import pytest

from executor_svc.core.messages import (
    AbortLease,
    Adopt,
    Disconnected,
    DrainExpired,
    DrainStarted,
    Heartbeat,
    HeldLease,
    LeaseEnded,
    Outcome,
    Tick,
    Welcomed,
)
from tests.executor.sessions import (
    GRACE_MS,
    attached,
    entries,
    grant,
    length,
    order,
    ref,
    report,
    start,
    step,
)


def test_adoption_sends_again_from_where_the_scheduler_is() -> None:
    session = attached()
    key, done = start(session, grant(1, num_samples=2), grant(3, ref("b")))
    step(session, (key, 0, 5), (key, 1, 6), (done, 0, 7), ends=(length(done, 1),))
    report(session)
    session.handle(Disconnected(), 0)
    step(session, (key, 2, 8))
    assert session.take_report() is None
    assert session.hello() == (
        HeldLease(ref(), "m", 2, (3, 0), False),
        HeldLease(ref("b"), "m", 1, (1,), True),
    )
    new, new_b = ref(attempt=1, epoch=2), ref("b", epoch=2)
    adopts = (Adopt(ref("b"), new_b, 3, (0,)), Adopt(ref(), new, 1, (1, 0)))
    assert session.handle(Welcomed(GRACE_MS, adopts), 10) == []
    taken = report(session)
    assert sorted(entries(taken)) == [(1, 1, 6), (1, 2, 8), (3, 0, 7)]
    assert taken.frame.ends == [length(3, 1)]
    assert taken.ended == (LeaseEnded(new_b, Outcome.COMPLETED, (1,)),)
    assert session.heartbeat() == Heartbeat((1, 3), 3)


@pytest.mark.parametrize(
    "adopt",
    [
        Adopt(ref("z"), ref("z", 2), 1, (0,)),
        Adopt(ref(attempt=9), ref(attempt=10), 1, (0,)),
        Adopt(ref(), ref("b"), 1, (0,)),
        Adopt(ref(), ref(attempt=2), 1, (2,)),
        Adopt(ref(), ref(attempt=2), 1, (0, 0)),
        Adopt(ref(), ref(attempt=2), 1 << 32, (0,)),
    ],
)
def test_an_adoption_that_does_not_fit_is_unknown(adopt: Adopt) -> None:
    session = attached()
    (key,) = start(session, grant(1))
    step(session, (key, 0, 5))
    session.handle(Disconnected(), 0)
    assert session.handle(Welcomed(GRACE_MS, (adopt,)), 1) == [AbortLease(key)]
    assert report(session).ended == (LeaseEnded(adopt.ref, Outcome.UNKNOWN),)
    assert session.is_idle


def test_hello_says_of_each_lease_what_it_takes_to_its_end() -> None:
    """The session has four slots, and no more are taken by however many samples."""
    session = attached()
    _, key, _ = start(
        session, grant(1), grant(2, ref("b"), num_samples=2), grant(4, ref("c"), num_samples=9)
    )
    step(session, (key, 0, 5), ends=(length(key, 1),))
    session.handle(DrainStarted(), 0)
    report(session)
    session.handle(Disconnected(), 0)
    assert session.num_slots == 0
    held = session.hello()
    assert [(lease.ref.request_id, lease.model, lease.num_slots) for lease in held] == [
        ("a", "m", 1),
        ("b", "m", 2),
        ("c", "m", 4),
    ]
    adopts = (Adopt(ref("c"), ref("c", 2), 1, (0,) * 9),)
    session.handle(Welcomed(GRACE_MS, adopts), 0)
    session.handle(Disconnected(), 0)
    assert [(lease.ref, lease.num_slots) for lease in session.hello()] == [(ref("c", 2), 4)]


def test_two_adoptions_cannot_share_a_handle() -> None:
    session = attached()
    start(session, grant(1), grant(2, ref("b")))
    session.handle(Disconnected(), 0)
    adopts = (Adopt(ref(), ref(attempt=2), 5, (0,)), Adopt(ref("b"), ref("b", 2), 5, (0,)))
    assert len(session.handle(Welcomed(GRACE_MS, adopts), 1)) == 1
    assert session.heartbeat() == Heartbeat((5,), 5)


def test_orphans_are_stopped_when_the_grace_is_over() -> None:
    session = attached()
    (key,) = start(session, grant(1))
    session.handle(Disconnected(), 100)
    session.handle(Disconnected(), 500)  # a failed dial in between does not prolong it
    assert session.orphan_deadline_ms == 100 + GRACE_MS
    assert session.handle(Tick(), 99 + GRACE_MS) == []
    assert session.handle(Tick(), 100 + GRACE_MS) == [AbortLease(key)]
    assert session.hello() == ()
    step(session, (key, 0, 5))
    assert session.is_idle


def test_a_welcome_ends_the_grace() -> None:
    session = attached()
    start(session, grant(1))
    session.handle(Disconnected(), 0)
    session.handle(Welcomed(GRACE_MS, (Adopt(ref(), ref(attempt=2), 1, (0,)),)), 10)
    assert session.handle(Tick(), 10 * GRACE_MS) == []
    assert session.heartbeat().handles == (1,)


def test_answers_about_strangers_are_not_repeated_on_a_new_stream() -> None:
    session = attached()
    order(session, revokes=(ref(),))
    session.handle(Disconnected(), 0)
    session.handle(Welcomed(GRACE_MS), 1)
    assert session.take_report() is None


def test_drain_finishes_then_hands_back() -> None:
    session = attached()
    a, b = start(session, grant(1), grant(2, ref("b")))
    assert session.handle(DrainStarted(), 0) == []
    assert report(session).num_slots == 0
    assert order(session, grants=(grant(3, ref("c")),)) == []
    assert report(session).ended == (LeaseEnded(ref("c"), Outcome.RETURNED),)
    step(session, (a, 0, 5), (b, 0, 6), ends=(length(a, 1),))
    assert session.handle(DrainExpired(), 0) == [AbortLease(b)]
    taken = report(session)
    assert entries(taken) == [(1, 0, 5), (2, 0, 6)]  # tokens are not thrown away
    assert {(e.ref.request_id, e.outcome) for e in taken.ended} == {
        ("a", Outcome.COMPLETED),
        ("b", Outcome.RETURNED),
    }
    assert not session.is_drained
    order(session, acknowledged=(ref(), ref("b")))
    assert session.is_drained


def test_an_idle_drain_still_tells_the_scheduler() -> None:
    session = attached()
    session.handle(DrainStarted(), 0)
    assert not session.is_drained
    assert report(session).num_slots == 0
    assert session.is_drained
