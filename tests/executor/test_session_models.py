"""The attach session when models come and go."""

import pytest

from executor_svc.core.messages import (
    AbortLease,
    Disconnected,
    DrainStarted,
    Effect,
    Heartbeat,
    LeaseEnded,
    LoadModel,
    LoadOrder,
    ModelChange,
    ModelLoaded,
    ModelLoadFailed,
    ModelState,
    Outcome,
    Welcomed,
)
from executor_svc.core.session import Session
from tests.executor.sessions import GRACE_MS, attached, changes, grant, order, ref, report, start


def load(session: Session, name: str, *evict: str) -> list[Effect]:
    return order(session, loads=(LoadOrder(name, evict),))


def residents(session: Session) -> set[str]:
    return {info.name for info in session.offers() if info.is_resident}


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


def test_a_hello_says_what_is_on_its_way() -> None:
    session = attached()
    load(session, "n")
    for _ in range(2):
        assert [info.name for info in session.offers() if info.is_loading] == ["n"]
        session.handle(Disconnected(), 0)
        session.handle(Welcomed(GRACE_MS), 0)
    session.handle(ModelLoaded("n", 5), 0)
    assert not any(info.is_loading for info in session.offers())
    load(session, "o", "n")
    session.handle(ModelLoadFailed("o", "no memory"), 0)
    assert not any(info.is_loading for info in session.offers())


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
