"""The attach protocol, order by order."""

import math
from typing import Any

import pytest

from executor_svc.core.engine import (
    FinishReason,
    LeaseFailure,
    ModelInfo,
    SamplingParams,
    SequenceEnd,
    StepOutput,
)
from executor_svc.core.messages import (
    AbortLease,
    Adopt,
    Disconnected,
    DrainExpired,
    DrainStarted,
    Effect,
    Failure,
    GeneratedSample,
    Grant,
    Heartbeat,
    HeldLease,
    LeaseEnded,
    LeaseRef,
    LeaseRefused,
    LoadModel,
    LoadOrder,
    ModelChange,
    ModelLoaded,
    ModelLoadFailed,
    ModelState,
    OrdersReceived,
    Outcome,
    Report,
    StartLease,
    StepDone,
    Tick,
    Welcomed,
)
from executor_svc.core.session import Session
from headway.reasons import Reason

GRACE_MS = 1000


def model(name: str, *, is_resident: bool = True) -> ModelInfo:
    return ModelInfo(name, "f", 100, 100, (), "w", "a", "float32", is_resident)


MODELS = (model("m"), model("n", is_resident=False), model("o", is_resident=False))


def ref(name: str = "a", attempt: int = 1, epoch: int = 1) -> LeaseRef:
    return LeaseRef(name, epoch, attempt)


def grant(handle: int = 1, lease: LeaseRef | None = None, **changes: Any) -> Grant:
    fields: dict[str, Any] = {
        "ref": lease or ref(),
        "handle": handle,
        "model": "m",
        "prompt_token_ids": [1, 2],
        "params": SamplingParams(max_tokens=8),
    }
    return Grant(**(fields | changes))


def attached(max_leases: int = 100, max_report_tokens: int = 1000) -> Session:
    session = Session(
        MODELS,
        num_slots=4,
        max_models=2,
        max_leases=max_leases,
        max_report_tokens=max_report_tokens,
    )
    assert session.handle(Welcomed(GRACE_MS), 0) == []
    return session


def order(session: Session, **orders: Any) -> list[Effect]:
    return session.handle(OrdersReceived(**orders), 0)


def start(session: Session, *grants: Grant) -> list[int]:
    """Grant, and give the keys that the engine was told."""
    effects = order(session, grants=grants)
    assert all(isinstance(effect, StartLease) for effect in effects)
    return [effect.request.key for effect in effects if isinstance(effect, StartLease)]


def step(
    session: Session,
    *entries: tuple[int, int, int],
    ends: tuple[SequenceEnd, ...] = (),
    failures: tuple[LeaseFailure, ...] = (),
) -> None:
    """Entries are (key, index, token); the logprob of a token is its negative."""
    output = StepOutput(
        key=[key for key, _, _ in entries],
        index=[index for _, index, _ in entries],
        token_id=[token for _, _, token in entries],
        logprob=[-float(token) for _, _, token in entries],
        ends=list(ends),
        failures=list(failures),
    )
    assert session.handle(StepDone(output), 0) == []


def report(session: Session) -> Report:
    taken = session.take_report()
    assert taken is not None
    return taken


def entries(taken: Report) -> list[tuple[int, int, int]]:
    frame = taken.frame
    return list(zip(frame.handle, frame.index, frame.token_id, strict=True))


def length(key: int, num_tokens: int) -> SequenceEnd:
    return SequenceEnd(key, num_tokens, FinishReason.LENGTH)


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
    "changes",
    [
        {"num_samples": 0},
        {"num_samples": 1 << 31},
        {"generated": (GeneratedSample([1]),) * 2},
        {"generated": (GeneratedSample([1] * 9),)},
        {"generated": (GeneratedSample([1], [0.5, 0.5]),)},
        {"generated": (GeneratedSample([1], end=length(0, 2)),)},
    ],
)
def test_a_senseless_grant_fails_and_is_kept_until_acknowledged(changes: dict[str, Any]) -> None:
    session = attached()
    assert order(session, grants=(grant(1, **changes),)) == []
    (ended,) = report(session).ended
    assert ended.outcome is Outcome.FAILED
    assert ended.failure is not None
    assert ended.failure.reason is Reason.INVALID_REQUEST
    session.handle(Disconnected(), 0)
    assert session.hello() == (HeldLease(ref(), (), True),)
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


def test_adoption_sends_again_from_where_the_scheduler_is() -> None:
    session = attached()
    key, done = start(session, grant(1, num_samples=2), grant(3, ref("b")))
    step(session, (key, 0, 5), (key, 1, 6), (done, 0, 7), ends=(length(done, 1),))
    report(session)
    session.handle(Disconnected(), 0)
    step(session, (key, 2, 8))
    assert session.take_report() is None
    assert session.hello() == (
        HeldLease(ref(), (3, 0), False),
        HeldLease(ref("b"), (1,), True),
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


# --- models come and go ------------------------------------------------------------------------


def load(session: Session, name: str, *evict: str) -> list[Effect]:
    return order(session, loads=(LoadOrder(name, evict),))


def residents(session: Session) -> set[str]:
    return {info.name for info in session.offers() if info.is_resident}


def changes(session: Session) -> tuple[ModelChange, ...]:
    taken = session.take_report()
    return () if taken is None else taken.models


def test_a_load_proves_a_models_class() -> None:
    session = attached()
    load(session, "n", "m")
    changes(session)
    session.handle(ModelLoaded("n", 1500, "proved"), 0)
    assert changes(session) == (
        ModelChange("n", ModelState.RESIDENT, 1500, exactness_class="proved"),
    )
    assert load(session, "n", "m") == []  # said twice
    assert changes(session) == (ModelChange("n", ModelState.RESIDENT, exactness_class="proved"),)
    assert {info.name: info.exactness_class for info in session.offers()}["n"] == "proved"


def test_a_model_comes_and_another_leaves() -> None:
    session = attached()
    assert load(session, "n", "m") == [LoadModel("n", ("m",))]
    assert changes(session) == (ModelChange("m", ModelState.ABSENT),)
    session.handle(ModelLoaded("n", 1500), 0)
    assert changes(session) == (ModelChange("n", ModelState.RESIDENT, 1500),)
    assert start(session, grant(1, model="n"))
    offers = {info.name: info for info in session.offers()}
    assert offers["n"].is_resident
    assert offers["n"].load_ms == 1500
    assert not offers["m"].is_resident


def test_a_load_that_fails_leaves_both_models_absent() -> None:
    session = attached()
    load(session, "n", "m")
    session.handle(ModelLoadFailed("n", "no memory"), 0)
    assert changes(session) == (
        ModelChange("m", ModelState.ABSENT),
        ModelChange("n", ModelState.FAILED, message="no memory"),
    )
    assert residents(session) == set()
    assert load(session, "n") == [LoadModel("n", ())], "it may be tried again"


@pytest.mark.parametrize(
    ("name", "evict", "message"),
    [
        ("x", (), "x is not offered"),
        ("n", ("x",), "x is not offered"),
        ("n", ("m",), "m has running leases"),
        ("n", ("o",), "o is being loaded"),
        ("n", (), "max_models is 2"),
    ],
)
def test_an_order_that_cannot_be_carried_out_changes_nothing(
    name: str, evict: tuple[str, ...], message: str
) -> None:
    session = attached()
    start(session, grant(1))
    assert load(session, "o") == [LoadModel("o", ())]
    assert load(session, name, *evict) == []
    here, change = changes(session)
    assert here == ModelChange("m", ModelState.RESIDENT)
    assert (change.model, change.state) == (name, ModelState.FAILED)
    assert change.message.startswith(message)
    assert residents(session) == {"m"}


def test_a_model_may_leave_once_its_last_lease_ended() -> None:
    session = attached()
    (key,) = start(session, grant(1))
    effects = order(session, revokes=(ref(),), loads=(LoadOrder("n", ("m",)),))
    assert effects == [AbortLease(key), LoadModel("n", ("m",))]


def test_orders_said_twice() -> None:
    session = attached()
    load(session, "n")
    assert load(session, "n") == []
    assert changes(session) == (), "the end of the load is the answer"
    session.handle(ModelLoaded("n", 5), 0)
    assert load(session, "n") == []
    assert changes(session) == (
        ModelChange("n", ModelState.RESIDENT, 5),
        ModelChange("n", ModelState.RESIDENT),
    )


def test_a_grant_for_a_model_that_is_not_there_is_returned() -> None:
    session = attached()
    assert order(session, grants=(grant(1, model="n"),)) == []
    taken = report(session)
    assert taken.ended == (LeaseEnded(ref(), Outcome.RETURNED),)
    assert taken.models == (ModelChange("n", ModelState.ABSENT),)
    load(session, "n")
    assert order(session, grants=(grant(2, ref("b"), model="n"),)) == []
    taken = report(session)
    assert taken.ended == (LeaseEnded(ref("b"), Outcome.RETURNED),)
    assert taken.models == ()
    assert session.heartbeat() == Heartbeat((), 2)


def test_a_revoke_while_a_model_is_loaded() -> None:
    session = attached()
    (key,) = start(session, grant(1))
    load(session, "n")
    assert order(session, revokes=(ref(),)) == [AbortLease(key)]
    assert report(session).ended == (LeaseEnded(ref(), Outcome.REVOKED, (0,)),)


def test_what_loads_while_no_stream_is_there_is_told_by_hello() -> None:
    session = attached()
    load(session, "n", "m")
    load(session, "o")
    session.handle(Disconnected(), 0)
    session.handle(ModelLoaded("n", 5), 0)
    assert residents(session) == {"n"}
    session.handle(ModelLoaded("o", 6), 0)  # hello is on its way
    session.handle(Welcomed(GRACE_MS), 0)
    assert changes(session) == (ModelChange("o", ModelState.RESIDENT, 6),)


def test_nothing_is_loaded_for_a_shutdown() -> None:
    session = attached()
    session.handle(DrainStarted(), 0)
    assert load(session, "n") == []
    assert changes(session)[-1].state is ModelState.FAILED
