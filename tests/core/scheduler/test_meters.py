"""What is measured of each model fades, and counts what it says."""

from scheduler_svc.core.domain import Lease
from scheduler_svc.core.meters import Meter


def lease(num_slots: int, granted_ms: int = 0) -> Lease:
    return Lease(("r", 1, 1), "e1", "A", num_slots, granted_ms)


def test_a_rate_is_that_of_the_last_half_minutes_of_backlog() -> None:
    meter, now_ms = Meter(), 0
    meter.granted(now_ms)
    assert meter.num_grants == 0, "nobody had to wait"
    meter.since_ms = now_ms
    for _ in range(100):
        now_ms += 10_000
        meter.granted(now_ms)
    assert abs(meter.backlogged_ms / meter.num_grants - 10_000) < 1
    for _ in range(3_000):
        now_ms += 100
        meter.granted(now_ms)
    assert abs(meter.backlogged_ms / meter.num_grants - 100) < 15


def test_a_wide_lease_takes_so_many_slots_and_each_sample_its_part_of_the_tokens() -> None:
    meter = Meter()
    meter.ended(lease(4), 80, 1_000)
    assert (meter.num_leases, meter.lease_ms, meter.slot_ms) == (1, 1_000, 4_000)
    assert meter.decode_ms / meter.num_decoded == 50, "20 tokens a sample in 1,000 ms"
    meter.ended(lease(1, granted_ms=1_000), 0, 1_500)
    assert meter.decode_ms / meter.num_decoded == 50, "a lease without tokens says nothing of them"


def test_means_follow_the_last_leases() -> None:
    meter = Meter()
    for _ in range(50):
        meter.ended(lease(1), 10, 1_000)
    for _ in range(100):
        meter.ended(lease(1), 10, 3_000)
    assert abs(meter.lease_ms / meter.num_leases - 3_000) < 20
