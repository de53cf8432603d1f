"""The attach session: leases from their grant to their end, whatever is said twice or too late."""

import math
from typing import Any

import pytest

from executor_svc.core.engine import LeaseFailure
from executor_svc.core.messages import (
    AbortLease,
    Adopt,
    Disconnected,
    Failure,
    GeneratedSample,
    Heartbeat,
    HeldLease,
    LeaseEnded,
    LeaseRef,
    LeaseRefused,
    Outcome,
    StartLease,
    Welcomed,
)
from headway.reasons import Reason
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


def test_a_lease_from_grant_to_acknowledgement() -> None:
    session = attached()
    (key,) = start(session, grant(7))
    assert session.take_report() is None
    assert session.heartbeat() == Heartbeat((7,), 7)

    step(session, (key, 0, 50))
    assert entries(report(session)) == [(7, 0, 50)]
    step(session, (key, 1, 51), ends=(length(key, 2),))
    last = report(session)
    assert entries(last) == [(7, 1, 51)]
    assert last.frame.ends == [length(7, 2)]
    assert last.ended == (LeaseEnded(ref(), Outcome.COMPLETED, (2,)),)
    assert session.heartbeat() == Heartbeat((7,), 7)

    assert order(session, acknowledged=(ref(),)) == []
    assert session.is_idle
    assert session.heartbeat() == Heartbeat((), 7)


def test_steps_merge_while_a_write_is_under_way() -> None:
    session = attached()
    a, b = start(session, grant(1), grant(2, ref("b")))
    step(session, (a, 0, 10), (b, 0, 20))
    step(session, (a, 1, 11), (b, 1, 21))
    taken = report(session)
    assert sorted(entries(taken)) == [(1, 0, 10), (1, 1, 11), (2, 0, 20), (2, 1, 21)]
    assert taken.frame.logprob == []


def test_logprobs_are_parallel_and_nan_where_not_asked() -> None:
    session = attached()
    a, b, c = start(session, grant(1), grant(2, ref("b"), wants_logprobs=True), grant(3, ref("c")))
    step(session, (a, 0, 10), (b, 0, 20), (c, 0, 30))
    step(session, (b, 1, 21))
    taken = report(session)
    assert entries(taken) == [(1, 0, 10), (2, 0, 20), (2, 1, 21), (3, 0, 30)]
    assert [None if math.isnan(p) else p for p in taken.frame.logprob] == [None, -20, -21, None]


def test_a_long_report_is_cut_and_the_end_stays_with_the_last_token() -> None:
    session = attached(max_report_tokens=2)
    (key,) = start(session, grant(1))
    step(session, (key, 0, 5), (key, 1, 6), (key, 2, 7), ends=(length(key, 3),))
    first = report(session)
    assert (entries(first), first.frame.ends, first.ended) == ([(1, 0, 5), (1, 1, 6)], [], ())
    second = report(session)
    assert entries(second) == [(1, 2, 7)]
    assert second.frame.ends
    assert second.ended


def test_samples_have_consecutive_keys_and_handles() -> None:
    session = attached()
    key, other = start(session, grant(1, num_samples=3), grant(4, ref("b")))
    assert other == key + 3
    step(session, (key + 2, 0, 9), ends=(length(key + 2, 1), length(key, 0)))
    taken = report(session)
    assert entries(taken) == [(3, 0, 9)]
    assert sorted(end.key for end in taken.frame.ends) == [1, 3]
    assert taken.ended == ()
    step(session, ends=(length(key + 1, 0),))
    assert report(session).ended == (LeaseEnded(ref(), Outcome.COMPLETED, (0, 0, 1)),)


def test_a_resumed_lease_goes_on_and_its_ended_samples_do_not() -> None:
    session = attached()
    done = GeneratedSample([4], end=length(0, 1))
    resumed = grant(1, num_samples=2, generated=(GeneratedSample([5, 6]), done))
    (effect,) = order(session, grants=(resumed,))
    assert isinstance(effect, StartLease)
    assert effect.request.generated == ([5, 6], [4])
    assert effect.request.ended == {1}
    step(session, (effect.request.key, 2, 7), ends=(length(effect.request.key, 3),))
    taken = report(session)
    assert entries(taken) == [(1, 2, 7)]
    assert taken.frame.ends == [length(1, 3)]
    assert taken.ended == (LeaseEnded(ref(), Outcome.COMPLETED, (3, 1)),)


def test_a_lease_whose_samples_all_ended_needs_no_engine() -> None:
    session = attached()
    done = GeneratedSample([4], end=length(0, 1))
    assert start(session, grant(1, generated=(done,))) == []
    assert report(session).ended == (LeaseEnded(ref(), Outcome.COMPLETED, (1,)),)


def test_revoke_stops_a_lease_and_drops_what_was_not_sent() -> None:
    session = attached()
    (key,) = start(session, grant(1))
    step(session, (key, 0, 5))
    assert order(session, revokes=(ref(),)) == [AbortLease(key)]
    step(session, (key, 1, 6), ends=(length(key, 2),))  # was on its way
    taken = report(session)
    assert entries(taken) == []
    assert taken.ended == (LeaseEnded(ref(), Outcome.REVOKED, (1,)),)
    assert order(session, revokes=(ref(),)) == []  # ended already
    assert session.take_report() is None
    order(session, acknowledged=(ref(),))
    assert session.is_idle


@pytest.mark.parametrize("stranger", [ref("z"), ref(attempt=2), ref(epoch=2)])
def test_revoke_and_acknowledgement_of_strangers(stranger: LeaseRef) -> None:
    session = attached()
    start(session, grant(1))
    assert order(session, acknowledged=(stranger,), revokes=(stranger,)) == []
    assert report(session).ended == (LeaseEnded(stranger, Outcome.UNKNOWN),)
    assert session.heartbeat().handles == (1,)


def test_an_acknowledged_lease_that_runs_is_stopped() -> None:
    session = attached()
    (key,) = start(session, grant(1))
    assert order(session, acknowledged=(ref(),)) == [AbortLease(key)]
    assert session.is_idle


def test_engine_failure_and_refusal_end_a_lease_with_its_tokens() -> None:
    session = attached()
    a, b = start(session, grant(1), grant(2, ref("b")))
    step(session, (a, 0, 5), failures=(LeaseFailure(a, Reason.INTERNAL, "secret"),))
    assert session.handle(LeaseRefused(b, Reason.PROMPT_TOO_LONG, "long"), 0) == []
    taken = report(session)
    assert entries(taken) == [(1, 0, 5)]
    failed, refused = taken.ended
    assert failed.outcome == refused.outcome == Outcome.FAILED
    assert failed.failure is not None
    assert "secret" not in failed.failure.message
    assert refused.failure == Failure(Reason.PROMPT_TOO_LONG, "long")
    session.handle(LeaseRefused(b, Reason.INTERNAL, "again"), 0)
    assert session.take_report() is None


@pytest.mark.parametrize(
    ("changes", "num_slots"),
    [
        ({"num_samples": 0}, 1),
        ({"num_samples": 1 << 31}, 4),
        ({"generated": (GeneratedSample([1]),) * 2}, 1),
        ({"generated": (GeneratedSample([1] * 9),)}, 1),
        ({"generated": (GeneratedSample([1], [0.5, 0.5]),)}, 1),
        ({"generated": (GeneratedSample([1], end=length(0, 2)),)}, 1),
    ],
)
def test_a_senseless_grant_fails_and_is_kept_until_acknowledged(
    changes: dict[str, Any], num_slots: int
) -> None:
    session = attached()
    assert order(session, grants=(grant(1, **changes),)) == []
    (ended,) = report(session).ended
    assert ended.outcome is Outcome.FAILED
    assert ended.failure is not None
    assert ended.failure.reason is Reason.INVALID_REQUEST
    session.handle(Disconnected(), 0)
    assert session.hello() == (HeldLease(ref(), "m", num_slots, (), True),)
    session.handle(Welcomed(GRACE_MS, (Adopt(ref(), ref(attempt=2), 1, (0,)),)), 0)
    assert [e.ref for e in report(session).ended] == [ref(attempt=2)]
    order(session, acknowledged=(ref(attempt=2),))
    assert session.is_idle


@pytest.mark.parametrize("handle", [0, 1, 2, 1 << 32])
def test_a_handle_that_is_not_free_fails_the_new_lease_only(handle: int) -> None:
    session = attached()
    start(session, grant(1, num_samples=2))
    assert order(session, grants=(grant(handle, ref("b")),)) == []
    (ended,) = report(session).ended
    assert (ended.ref, ended.outcome) == (ref("b"), Outcome.FAILED)
    assert session.heartbeat() == Heartbeat((1,), 1)


def test_a_grant_that_is_said_twice_changes_nothing() -> None:
    session = attached()
    start(session, grant(1))
    assert order(session, grants=(grant(1), grant(5))) == []
    assert session.take_report() is None


def test_a_newer_grant_replaces_and_an_older_one_is_stale() -> None:
    session = attached()
    (old,) = start(session, grant(1, ref(attempt=2)))
    effects = order(session, grants=(grant(2, ref(attempt=3)), grant(3, ref(attempt=1))))
    assert effects[0] == AbortLease(old)
    assert isinstance(effects[1], StartLease)
    assert len(effects) == 2
    replaced, stale = report(session).ended
    assert (replaced.ref.attempt, replaced.outcome) == (2, Outcome.REVOKED)
    assert (stale.ref.attempt, stale.outcome) == (1, Outcome.FAILED)
    assert stale.failure is not None
    assert stale.failure.reason is Reason.STALE_LEASE
    assert session.heartbeat().handles == (2,)


def test_more_leases_than_the_limit_are_handed_back() -> None:
    session = attached(max_leases=1)
    start(session, grant(1))
    assert order(session, grants=(grant(2, ref("b")),)) == []
    assert report(session).ended == (LeaseEnded(ref("b"), Outcome.RETURNED),)
