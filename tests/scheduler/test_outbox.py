"""Orders to one executor: the welcome first, grants before what refers to them."""

from headway.v1 import fleet_pb2 as fleet
from scheduler_svc.outbox import Outbox
from tests.scheduler.world import body


def grant(number: int) -> fleet.Grant:
    return fleet.Grant(lease=fleet.LeaseRef(request_id=str(number)), request=body())


def test_the_welcome_is_first() -> None:
    outbox = Outbox()
    assert outbox.take(1_000) is None
    outbox.grants.append(grant(1))
    outbox.welcome = fleet.ExecutorWelcome(epoch=1)
    first, second = outbox.take(1_000), outbox.take(1_000)
    assert first is not None
    assert first.HasField("welcome")
    assert outbox.has_welcomed
    assert second is not None
    assert len(second.orders.grants) == 1
    assert outbox.take(1_000) is None


def test_revokes_wait_for_the_last_grant() -> None:
    outbox = Outbox()
    outbox.grants.extend(map(grant, range(3)))
    outbox.revokes.append(fleet.LeaseRef(request_id="2"))
    max_bytes = 2 * grant(0).ByteSize()
    first, second = outbox.take(max_bytes), outbox.take(max_bytes)
    assert first is not None
    assert second is not None
    assert [len(first.orders.grants), len(first.orders.revokes)] == [2, 0]
    assert [len(second.orders.grants), len(second.orders.revokes)] == [1, 1]


def test_a_grant_above_the_limit_goes_alone() -> None:
    outbox = Outbox()
    outbox.grants.extend(map(grant, range(2)))
    first = outbox.take(1)
    assert first is not None
    assert len(first.orders.grants) == 1


def test_loads_come_last() -> None:
    outbox = Outbox()
    outbox.grants.extend(map(grant, range(2)))
    outbox.loads.append(fleet.LoadModel(model="m"))
    first, second = outbox.take(1), outbox.take(1)
    assert first is not None
    assert second is not None
    assert [load.model for load in second.orders.loads] == ["m"]
    assert not first.orders.loads
    assert outbox.take(1) is None
    outbox.loads.append(fleet.LoadModel(model="n"))
    assert outbox.take(1) is not None
