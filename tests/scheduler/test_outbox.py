"""Orders to one executor: the welcome first, grants before what refers to them."""

from headway.v1 import fleet_pb2 as fleet
from scheduler_svc.outbox import Outbox


def grant(outbox: Outbox, number: int, num_bytes: int = 10) -> None:
    outbox.orders_for_grant(num_bytes).grants.add(lease=fleet.LeaseRef(request_id=str(number)))


def taken(outbox: Outbox) -> list[tuple[int, int]]:
    """(grants, revokes) of every message that waits."""
    messages = []
    while (message := outbox.take()) is not None:
        messages.append((len(message.orders.grants), len(message.orders.revokes)))
    return messages


def test_the_welcome_is_first() -> None:
    outbox = Outbox(1_000)
    assert outbox.take() is None
    grant(outbox, 1)
    outbox.welcome = fleet.ExecutorWelcome(epoch=1)
    first = outbox.take()
    assert first is not None
    assert first.HasField("welcome")
    assert outbox.has_welcomed
    assert taken(outbox) == [(1, 0)]


def test_revokes_wait_for_the_last_grant() -> None:
    outbox = Outbox(20)
    for number in range(3):
        grant(outbox, number)
    outbox.orders().revokes.add(request_id="2")
    assert outbox.num_answers == 1
    assert taken(outbox) == [(2, 0), (1, 1)]
    assert outbox.num_answers == 0


def test_a_grant_above_the_limit_goes_alone() -> None:
    outbox = Outbox(1)
    grant(outbox, 0)
    grant(outbox, 1)
    assert taken(outbox) == [(1, 0), (1, 0)]


def test_a_load_does_not_overtake_a_grant() -> None:
    outbox = Outbox(10)
    grant(outbox, 0)
    grant(outbox, 1)
    outbox.orders().loads.add(model="m")
    first, second = outbox.take(), outbox.take()
    assert first is not None
    assert second is not None
    assert not first.orders.loads
    assert [load.model for load in second.orders.loads] == ["m"]
