"""Somebody who waits is not starved by others who keep coming, are first in its flow, and give up.

The tenant of the one who waits had service, so whoever comes goes first in its flow, and gives up
before it has waited long. What the flow may claim must not be as young as its head.
"""

import pytest

from scheduler_svc.core.messages import Action, Event
from tests.machine.honest_executor import FOREVER_MS, Executor
from tests.machine.honest_fleet import Stream, World
from tests.machine.scenes import LEASE_MS, SETTINGS, Scene

IMPATIENT_MS = 70
MODEL_MS = Scene().model_ms


def heard(event: Event, sent: list[Action]) -> None:
    """Nothing is checked on the way."""


def stream(
    world: World, tenant: str, model: str, band: int = 0, timeout_ms: int = FOREVER_MS
) -> None:
    """A tenant that keeps asking: one request waits at any time, of a patient one two."""
    name = tenant, model, band
    world.streams[name] = Stream(
        *name, 2 if timeout_ms == FOREVER_MS else 1, LEASE_MS, 5, queue_timeout_ms=timeout_ms
    )
    world.top_up()


@pytest.mark.parametrize(
    ("max_models", "other", "band"),
    [(1, "A", 0), (2, "A", 0), (2, "B", 1)],
    ids=["without a place", "beside another model", "behind another band"],
)
def test_the_old_one_gets_its_turn(max_models: int, other: str, band: int) -> None:
    world = World(SETTINGS, heard)
    offers = frozenset("AB")
    world.attach(Executor("e0", num_slots=2, max_models=max_models, offers=offers))
    once = Stream("had service", "B", band, 1, LEASE_MS, 5)
    world.submit(once)
    world.run(MODEL_MS)
    stream(world, "busy 0", other)
    world.run(130)
    stream(world, "busy 1", other)
    world.run(MODEL_MS)
    for number in range(3):
        stream(world, f"impatient {number}", "B", band, IMPATIENT_MS)
        world.run(IMPATIENT_MS // 3)
    world.submit(once)
    [old] = [client.request for client in world.waiting() if client.stream is once]
    waited_ms = 0
    while world.is_waiting(old.request_id):
        world.run(100)
        waited_ms += 100
        assert waited_ms <= 2 * MODEL_MS
