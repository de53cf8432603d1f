"""The queue: order, bounds, removal anywhere, position counting."""

import random

from headway.reasons import Reason
from scheduler_svc.core.domain import CoreSettings, RequestRecord
from scheduler_svc.core.flow import Order
from scheduler_svc.core.lazy_heap import LazyHeap
from scheduler_svc.core.line import Crowd, Line
from scheduler_svc.core.queue import Queue
from tests.core.scheduler.helpers import Driver, granted, rejection, request


def record(arrival: int, model: str = "A", tenant: str = "t", band: int = 0) -> RequestRecord:
    return RequestRecord(request(f"r{arrival}", model, tenant=tenant, band=band), arrival, 0, 0)


def test_lazy_heap_orders_changes_and_forgets() -> None:
    heap: LazyHeap[int, str] = LazyHeap()
    for key, item in enumerate("abcd"):
        heap.set(item, key)
    heap.set("a", 9)
    heap.discard("b")
    heap.discard("unknown")
    assert [heap.pop() for _ in range(4)] == [(2, "c"), (3, "d"), (9, "a"), None]
    assert len(heap) == 0


def test_lazy_heap_memory_stays_near_its_content() -> None:
    heap: LazyHeap[int, str] = LazyHeap()
    heap.set("first", 0)
    for key in range(1, 10_000):
        heap.set("other", key)
    assert len(heap._heap) < 50


def test_a_line_counts_like_a_sorted_list() -> None:
    rng = random.Random(1)
    everybody = [record(number) for number in range(3_000)]
    line, crowd, members = Line(), Crowd(), dict[int, int]()
    for _ in range(6_000):
        number = rng.randrange(3_000)
        if number in members:
            del members[number]
            line.remove(everybody[number])
            crowd.remove(number)
        else:
            members[number] = rng.randrange(1, 9)
            line.add(everybody[number], members[number])
            crowd.add(number)
        probe = rng.randrange(3_000)
        before = [cost for member, cost in members.items() if member < probe]
        assert line.before(probe) == (len(before), sum(before))
        assert crowd.count_before(probe) == len(before)
        assert len(crowd) == len(line) == len(members)
    in_order = [everybody[number] for number in sorted(members)]
    assert list(line.items()) == [(each, members[each.arrival]) for each in in_order]
    assert list(line) == in_order
    assert line.cost == sum(members.values())
    assert (line.first, line.last) == (in_order[0], in_order[-1])
    assert [line.at(index) for index in range(len(line))] == in_order
    for _ in range(100):
        weight, arrival = rng.choice((1.0, 3.0, 0.7)), rng.randrange(3_000)
        starts = [(5.5 + line.before(each.arrival)[1] / weight, each.arrival) for each in line]
        start = rng.choice(starts)[0] + rng.choice((0, 0, 0.3))
        expected = sum(each < (start, arrival) for each in starts)
        assert line.starting_before(start, arrival, 5.5, weight) == expected


def test_a_line_that_is_emptied_from_either_end_is_as_new() -> None:
    everybody = [record(number) for number in range(2_000)]
    for order in (everybody, everybody[::-1]):
        line, crowd = Line(), Crowd()
        for each in everybody:
            line.add(each, 2)
            crowd.add(each.arrival)
        left = list(everybody)
        for each in order:
            assert (line.first, line.last, len(line)) == (left[0], left[-1], len(left))
            assert crowd.count_before(5_000) == len(left)
            line.remove(each)
            crowd.remove(each.arrival)
            left.remove(each)
        assert (len(line), line.cost, len(crowd)) == (0, 0, 0)
        line.add(everybody[7], 3)
        assert (line.first, line.cost) == (everybody[7], 3)


def test_tenants_stand_by_virtual_time_and_then_by_arrival() -> None:
    rng = random.Random(4)
    order, lanes = Order(), dict[str, Line]()
    for arrival in range(3_000):
        tenant = str(rng.randrange(40))
        if tenant in lanes and rng.random() < 0.4:
            order.remove(lanes.pop(tenant))
        else:
            lane = lanes.setdefault(tenant, Line())
            lane.add(record(arrival), 1)
            if len(lane) > 1 and rng.random() < 0.5:
                lane.remove(lane.first)
            order.set(lane, rng.choice((0.0, 0.5, 7.25)))
        assert len(order) == len(lanes)
        expected = sorted(lanes.values(), key=lambda lane: (lane.key, lane.turn))
        assert all(lane.turn == lane.first.arrival for lane in expected)
        assert [order.key(at) for at in range(len(order))] == [lane.key for lane in expected]
        assert [order.oldest(at) for at in range(len(order))] == [lane.first for lane in expected]


def test_flow_is_fifo_over_all_tenants() -> None:
    queue = Queue(CoreSettings())
    for arrival, tenant in enumerate("abacb"):
        queue.add(record(arrival, tenant=tenant))
    order = []
    while (head := queue.head("A")) is not None:
        order.append(head.arrival)
        queue.remove(head)
    assert order == [0, 1, 2, 3, 4]


def test_removal_anywhere_and_return_to_the_head() -> None:
    queue = Queue(CoreSettings())
    records = [record(arrival) for arrival in range(5)]
    for each in records:
        queue.add(each)
    for gone in (2, 0, 1):
        queue.remove(records[gone])
    for back in (1, 0):
        queue.add(records[back])
    assert [each.arrival for each in queue.in_order({}, [0] * 4)] == [0, 1, 3, 4]
    assert queue.head("A") is records[0]
    assert records[2] not in queue


def test_bands_come_before_arrival() -> None:
    queue = Queue(CoreSettings())
    records = [record(0, band=2), record(1, band=1), record(2, model="B"), record(3, band=1)]
    for each in records:
        queue.add(each)
    assert [each.arrival for each in queue.in_order({}, [0] * 4)] == [2, 1, 3, 0]
    assert queue.head("A") is records[1]
    place = queue.bands[2]["A"].place(records[0])
    assert queue.num_before(2, "A", place, {"A": 0}) == 2
    assert queue.num_before(2, "A", place, {"A": 0, "B": 0}) == 3
    assert queue.num_waiting(["A", "B", "C"]) == 4


def test_each_bound_refuses_at_the_door() -> None:
    for bound, limit in (
        ("max_queued_requests", 2),
        ("max_queued_tokens", 2 * 30),
        ("max_queued_bytes", 2 * 100),
    ):
        driver = Driver(**{bound: limit})
        driver.attach(num_slots=1)
        driver.submit("running")
        driver.submit("a")
        driver.submit("b")
        refused = rejection(driver.submit("c"))
        assert refused.reason is Reason.QUEUE_FULL
        assert refused.retry_after_ms is not None
        driver.cancel("a")
        assert driver.submit("d")
        assert driver.core.num_waiting == 2


def test_what_goes_back_is_never_refused() -> None:
    driver = Driver(max_queued_requests=1)
    driver.attach(num_slots=1)
    driver.submit("a")
    driver.submit("b")
    driver.attach(num_slots=1, incarnation="i2", models="B")
    assert driver.core.num_waiting == 2
    assert driver.core.decisions["requeued.executor_restarted"] == 1


def test_a_later_band_waits_for_every_earlier_one() -> None:
    driver = Driver()
    driver.attach(num_slots=1)
    driver.submit("running")
    driver.submit("low", band=3)
    driver.submit("high", band=0)
    driver.submit("middle", band=2)
    order = ["running"]
    for _ in range(3):
        order += [name for name, _ in granted(driver.end(order[-1]))]
    assert order == ["running", "high", "middle", "low"]


def test_every_sample_is_paid_for_and_output_costs_more_than_prompt() -> None:
    queue = Queue(CoreSettings(output_token_weight=2))
    assert queue.cost(request("r", num_prompt_tokens=10, max_tokens=20, num_samples=3)) == 130


def test_of_equal_keys_of_two_models_the_earlier_arrival_goes_first() -> None:
    """A warm request counts as older; one that is really as old goes before it all the same."""
    queue = Queue(CoreSettings())
    cold, warm = record(10, "A"), record(15, "B")
    queue.add(cold)
    queue.add(warm)
    shifts = {"A": 0, "B": 5}
    place = {each: queue.bands[0][each.request.model].place(each) for each in (cold, warm)}
    assert queue.num_before(0, "B", place[warm], shifts) == 1
    assert queue.num_before(0, "A", place[cold], shifts) == 0
    assert list(queue.in_order(shifts, [0] * 4)) == [cold, warm]


def test_later_bands_leave_the_last_part_of_each_bound_to_earlier_ones() -> None:
    """Whoever is least urgent cannot close the door to the others, however much of it comes."""
    for bound, limit in (
        ("max_queued_requests", 10),
        ("max_queued_tokens", 10 * 30),
        ("max_queued_bytes", 10 * 100),
    ):
        driver = Driver(num_bands=4, band_queue_shares=(1.0, 0.8, 0.5), **{bound: limit})
        driver.attach()
        driver.submit("running")
        for band, num_let_in in ((3, 5), (2, 0), (1, 3), (0, 2)):
            before = driver.core.num_waiting
            for number in range(12):
                driver.submit(f"{band} {number}", band=band)
            assert driver.core.num_waiting - before == num_let_in


def test_no_share_of_a_small_queue_is_nothing() -> None:
    driver = Driver(max_queued_requests=1, band_queue_shares=(0.1,))
    driver.attach()
    driver.submit("running")
    driver.submit("waits")
    assert driver.core.num_waiting == 1
