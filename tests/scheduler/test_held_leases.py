"""What an executor says of the leases that it holds: checked at the door, booked where nobody knows
better."""

import pytest

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from scheduler_svc import fleet_translate
from scheduler_svc.core import messages
from scheduler_svc.settings import SchedulerSettings
from tests.scheduler.world import CARD, body, held_lease, world

SETTINGS = SchedulerSettings(max_name_chars=16, max_slots_per_executor=8)


def lease(request_id: str = "r", **changes: object) -> fleet.HeldLease:
    held = held_lease(fleet.LeaseRef(request_id=request_id, epoch=2, attempt=3))
    held.MergeFrom(fleet.HeldLease(**changes))  # type: ignore[arg-type]
    return held


def hello(*leases: fleet.HeldLease, num_slots: int = 4) -> fleet.ExecutorHello:
    return fleet.ExecutorHello(
        executor_id="e1",
        incarnation="1",
        capacity=fleet.Capacity(num_slots=num_slots, max_models=1),
        models=[fleet.ModelOffer(card=CARD, resident=True)],
        leases=leases,
    )


def without(lease: fleet.HeldLease, field: str) -> fleet.HeldLease:
    lease.ClearField(field)  # type: ignore[arg-type]
    return lease


def test_what_a_lease_takes_comes_in_at_the_door() -> None:
    """More than the executor may have now, and an ended one of a model that it never offered."""
    leases = lease(num_slots=6), lease("s", num_slots=2), lease("t", model="other", ended=True)
    attached = fleet_translate.attached(hello(*leases), 1, SETTINGS)
    assert attached.held == (
        messages.HeldLease("r", 2, 3, "tiny", 6, has_ended=False),
        messages.HeldLease("s", 2, 3, "tiny", 2, has_ended=False),
        messages.HeldLease("t", 2, 3, "other", 1, has_ended=True),
    )


BAD = {
    "no model": ([without(lease(), "model")], "leases.model"),
    "no model, ended": ([without(lease(ended=True), "model")], "leases.model"),
    "long model": ([lease(model="x" * 17)], "leases.model"),
    "unprintable model": ([lease(model="a\nb", ended=True)], "leases.model"),
    "a model that is not offered": ([lease(model="other")], "leases.model"),
    "no slots": ([without(lease(), "num_slots")], "leases.num_slots"),
    "no slots, ended": ([without(lease(ended=True), "num_slots")], "leases.num_slots"),
    "more slots than an executor may have": ([lease(num_slots=9)], "leases.num_slots"),
    "a huge number": ([lease(num_slots=(1 << 32) - 1)], "leases.num_slots"),
    "more together": ([lease(num_slots=5), lease("s", num_slots=4)], "leases.num_slots"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_honest_executor_says_is_refused(name: str) -> None:
    leases, field = BAD[name]
    with pytest.raises(HeadwayError) as caught:
        fleet_translate.attached(hello(*leases), 1, SETTINGS)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.field == field


def test_what_ended_takes_nothing_that_counts_against_the_limit() -> None:
    ended = [lease(name, num_slots=8, ended=True) for name in "abc"]
    running = lease(num_slots=8)
    assert len(fleet_translate.attached(hello(*ended, running), 1, SETTINGS).held) == 4


async def test_a_refused_lease_costs_its_executor_the_stream_and_nobody_else() -> None:
    async with world() as own:
        good, bad, client = own.executor("e1"), own.executor("e2"), own.client()
        await good.attach()
        with pytest.raises(HeadwayError, match=r"leases\.num_slots: must be from 1 to 4096"):
            await bad.attach(leases=[lease(num_slots=1 << 20)])
        await client.open()
        await client.submit()
        await client.accepted()
        await good.run(await good.grant(), [1, 2, 3, 4])
        assert not (await client.finished()).HasField("failure")


async def test_slots_of_a_lease_that_nobody_knows_are_granted_when_it_ended() -> None:
    """A scheduler that began anew, an executor with work for the one before, and one slot free."""
    async with world() as own:
        executor, client = own.executor(), own.client()
        old = lease("old", num_slots=3)
        await executor.attach(num_slots=4, leases=[old])
        (revoked,) = (await executor.read()).orders.revokes
        assert revoked == old.lease
        await client.open()
        await client.submit(request=body(num_samples=2))
        await client.accepted()
        await client.submit(handle=10)
        await client.accepted()
        shown = own.process.runtime.executor("e1")
        assert shown is not None
        assert (shown.num_leased, shown.num_free) == (3, 1), "the wide one keeps the slot"
        await executor.end(old.lease, outcome=fleet.LeaseEnded.OUTCOME_REVOKED)
        grants = (await executor.read()).orders.grants
        assert [grant.request.num_samples for grant in grants] == [2, 1]


async def test_a_forgotten_lease_keeps_its_model_on_the_device() -> None:
    """Two models are there and one may leave: not the one that the lease runs on."""
    names = ("tiny", "idle", "cold")
    cards = [generation.ModelCard() for _ in names]
    for card, name in zip(cards, names, strict=True):
        card.CopyFrom(CARD)
        card.name = name
    async with world() as own:
        executor, client = own.executor(), own.client()
        old = lease("old")
        await executor.attach(models=cards[:2], absent=cards[2:], max_models=2, leases=[old])
        assert (await executor.read()).orders.revokes
        await client.open()
        await client.submit(request=body(model="cold"))
        await client.accepted()
        (load,) = (await executor.read()).orders.loads
        assert (load.model, list(load.evict)) == ("cold", ["idle"])
