"""Records of the core are freed by counting references, so that no collector need look at them:
compiled, it does not even know them (hatch_build.without_collector)."""

import dataclasses
import gc
from collections.abc import Callable, Iterator

import pytest

from bench.sim.compare import Plan, world_of
from scheduler_svc.core.messages import LeaseOutcome
from tests.core.scheduler.helpers import Driver, interpreted_only

pytestmark = interpreted_only


@pytest.fixture(autouse=True)
def _kept_garbage() -> Iterator[None]:
    """What only the collector can free is kept where it is seen."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def _left_behind(act: Callable[[], object]) -> set[str]:
    """Classes of the core's records that are left to the collector."""
    kept = act()
    gc.collect()
    del kept
    kinds = {type(found) for found in gc.garbage}
    core = "scheduler_svc.core."
    return {
        kind.__name__
        for kind in kinds
        if kind.__module__.startswith(core) and dataclasses.is_dataclass(kind)
    }


def test_what_is_left_behind_is_seen() -> None:
    def act() -> None:
        driver = Driver()
        driver.attach()
        driver.submit("r1")
        record = driver.core._state.requests.get("r1")
        assert record is not None
        assert record.lease is not None
        record.lease.debtor = record

    assert "RequestRecord" in _left_behind(act)


@pytest.mark.parametrize("outcome", [LeaseOutcome.COMPLETED, LeaseOutcome.REVOKED])
def test_a_request_that_ended_before_its_lease_is_freed(outcome: LeaseOutcome) -> None:
    def act() -> Driver:
        driver = Driver()
        driver.attach()
        driver.submit("r1")
        driver.cancel("r1")
        driver.end("r1", outcome=outcome)
        return driver

    assert not _left_behind(act)


def test_one_whose_executor_was_lost_is_freed() -> None:
    def act() -> Driver:
        driver = Driver()
        driver.attach()
        driver.submit("r1")
        driver.cancel("r1")
        driver.disconnect()
        driver.advance(60_000)
        return driver

    assert not _left_behind(act)


def test_two_minutes_of_faults_leaves_nothing_behind() -> None:
    """Crashes, stalls, clients that hang up; the world lives on, since whoever drops all of it at
    once drops whatever refers to each other in it as well."""

    def act() -> object:
        world = world_of(
            Plan("headway", load=1.1, seed=3, seconds=120, num_faults=6, impatient_share=0.3)
        )
        world.run()
        return world

    assert not _left_behind(act)
