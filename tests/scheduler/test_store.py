"""What every store promises. A new store joins by one line in MAKERS."""

from collections.abc import Callable

import pytest

from headway.errors import HeadwayError
from headway.reasons import Reason
from scheduler_svc.store.base import AcceptedRecord, FinishedRecord, Store
from scheduler_svc.store.memory import MemoryStore


class Clock:
    def __init__(self) -> None:
        self.now_ms = 0

    def __call__(self) -> int:
        return self.now_ms


Maker = Callable[[Clock], Store]


def make_memory(clock: Clock) -> Store:
    return MemoryStore(
        result_ttl_ms=1_000, max_result_bytes=1_200, max_tombstones=3, clock_ms=clock
    )


MAKERS: dict[str, Maker] = {"memory": make_memory}


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest) -> Maker:
    return MAKERS[request.param]


def accepted(request_id: str) -> AcceptedRecord:
    return AcceptedRecord(request_id, "t", "", b"", b"body")


def finished(request_id: str, num_bytes: int = 10) -> FinishedRecord:
    return FinishedRecord(request_id, "t", b"r" * num_bytes)


async def reason_of(store: Store, request_id: str, tenant: str = "t") -> Reason:
    with pytest.raises(HeadwayError) as caught:
        await store.get_result(request_id, tenant)
    return caught.value.reason


async def test_epochs_rise(maker: Maker) -> None:
    store = maker(Clock())
    epoch = await store.open()
    assert 0 < epoch < 1 << 63
    await store.close()


async def test_a_result_is_read_any_number_of_times(maker: Maker) -> None:
    store = maker(Clock())
    await store.open()
    await store.commit([accepted("a"), accepted("b"), finished("a")])
    assert await store.get_result("a", "t") == finished("a")
    assert await store.get_result("a", "t") == finished("a")
    assert await reason_of(store, "b") is Reason.REQUEST_NOT_FOUND
    assert await reason_of(store, "never") is Reason.REQUEST_NOT_FOUND


async def test_the_first_end_counts(maker: Maker) -> None:
    store = maker(Clock())
    await store.open()
    await store.commit([accepted("a"), finished("a", 10)])
    await store.commit([finished("a", 20)])
    assert await store.get_result("a", "t") == finished("a", 10)


async def test_results_expire_and_say_so(maker: Maker) -> None:
    clock = Clock()
    store = maker(clock)
    await store.open()
    await store.commit([accepted("a"), finished("a")])
    clock.now_ms = 999
    assert await store.get_result("a", "t")
    clock.now_ms = 1_000
    await store.expire()
    assert await reason_of(store, "a") is Reason.RESULT_EXPIRED
    await store.commit([finished("a")])
    assert await reason_of(store, "a") is Reason.RESULT_EXPIRED


async def test_bytes_are_bounded_and_the_oldest_goes_first(maker: Maker) -> None:
    store = maker(Clock())
    await store.open()
    for request_id in ("a", "b", "c"):
        await store.commit([accepted(request_id), finished(request_id, 40)])
    assert await reason_of(store, "a") is Reason.RESULT_EXPIRED
    assert await store.get_result("b", "t")
    assert await store.get_result("c", "t")


async def test_short_results_count_with_what_they_really_cost(maker: Maker) -> None:
    store = maker(Clock())
    await store.open()
    for number in range(5):
        await store.commit([finished(str(number), 0)])
    assert await reason_of(store, "0") is Reason.RESULT_EXPIRED


async def test_another_tenants_request_is_not_found_expired_or_not(maker: Maker) -> None:
    clock = Clock()
    store = maker(clock)
    await store.open()
    await store.commit([accepted("a"), finished("a")])
    assert await reason_of(store, "a", "x") is Reason.REQUEST_NOT_FOUND
    clock.now_ms = 1_000
    await store.expire()
    assert await reason_of(store, "a", "x") is Reason.REQUEST_NOT_FOUND
    assert await reason_of(store, "a") is Reason.RESULT_EXPIRED


async def test_tombstones_are_bounded(maker: Maker) -> None:
    clock = Clock()
    store = maker(clock)
    await store.open()
    for number in range(4):
        await store.commit([accepted(str(number)), finished(str(number))])
    clock.now_ms = 1_000
    await store.expire()
    assert await reason_of(store, "0") is Reason.REQUEST_NOT_FOUND
    assert await reason_of(store, "1") is Reason.RESULT_EXPIRED
    assert await reason_of(store, "3") is Reason.RESULT_EXPIRED
