"""Deadlines: order of time and of setting, whatever is moved and discarded in between."""

import random

from scheduler_svc.core.deadlines import Deadline, Deadlines, GraceDue, LoadDue, ModelDue
from scheduler_svc.core.domain import RequestRecord
from tests.core.scheduler.helpers import request


def record(number: int) -> RequestRecord:
    return RequestRecord(request(f"r{number}"), number, 0, 0)


def test_equal_names_of_different_kinds_are_different_deadlines() -> None:
    deadlines = Deadlines()
    deadlines.set(GraceDue("x"), 5)
    deadlines.set(LoadDue("x"), 5)
    deadlines.set(ModelDue("x"), 4)
    assert [deadlines.pop_due(5) for _ in range(4)] == [
        ModelDue("x"),
        GraceDue("x"),
        LoadDue("x"),
        None,
    ]


def test_what_is_set_again_moves_behind_others_of_the_same_millisecond() -> None:
    deadlines = Deadlines()
    for name in "abc":
        deadlines.set(ModelDue(name), 1_000)
    deadlines.set(ModelDue("a"), 1_000)
    assert deadlines.pop_due(999) is None
    order = [deadlines.pop_due(1_000) for _ in range(3)]
    assert order == [ModelDue("b"), ModelDue("c"), ModelDue("a")]
    assert deadlines.next_ms() is None


def test_they_fall_due_like_a_sorted_list() -> None:
    rng = random.Random(3)
    deadlines = Deadlines()
    expected: dict[Deadline, tuple[int, int]] = {}
    now_ms = 0
    for number in range(20_000):
        deadline = ModelDue(str(rng.randrange(300)))
        if rng.random() < 0.6:
            at_ms = now_ms + rng.choice((0, 1, 200, 5_000, 86_400_000))
            deadlines.set(deadline, at_ms)
            expected[deadline] = (at_ms, number)
        else:
            deadlines.discard(deadline)
            expected.pop(deadline, None)
        assert deadlines.at_ms(deadline) == expected.get(deadline, (None,))[0]
        assert deadlines.next_ms() == min(expected.values(), default=(None,))[0]
        now_ms += rng.randrange(3)
        while (due := deadlines.pop_due(now_ms)) is not None:
            first = min(expected.values())
            assert expected.pop(due) == first
        assert all(at_ms > now_ms for at_ms, _ in expected.values())
    assert set(deadlines) == set(expected)


def test_requests_fall_due_like_a_sorted_list_beside_others() -> None:
    rng = random.Random(4)
    deadlines = Deadlines()
    names: list[Deadline] = [*map(record, range(200)), *(ModelDue(str(n)) for n in range(20))]
    expected: dict[Deadline, tuple[int, int]] = {}
    now_ms = 0
    for number in range(20_000):
        deadline = rng.choice(names)
        if rng.random() < 0.6:
            at_ms = now_ms + rng.choice((0, 1, 200, 300, 5_000, 86_400_000))
            deadlines.set(deadline, at_ms)
            expected[deadline] = (at_ms, number)
        else:
            deadlines.discard(deadline)
            expected.pop(deadline, None)
        assert deadlines.at_ms(deadline) == expected.get(deadline, (None,))[0]
        if number % 3:
            assert deadlines.next_ms() == min(expected.values(), default=(None,))[0]
        now_ms += rng.randrange(3)
        while (due := deadlines.pop_due(now_ms)) is not None:
            first = min(expected.values())
            assert expected.pop(due) == first
    assert set(deadlines) == set(expected)


def test_memory_stays_near_what_is_set() -> None:
    deadlines = Deadlines()
    deadlines.set(record(1), 1)
    moves, same, close = map(record, range(3))
    for number in range(10_000):
        deadlines.set(ModelDue("moves"), 600_000 + number * 10)
        deadlines.set(moves, 600_000 + number * 10)
        deadlines.set(same, 1_000)
        deadlines.set(close, 2 + number % 100)
        deadlines.next_ms()
    shards = deadlines._shards.values()
    assert len(shards) <= 3
    assert sum(len(shard.records) + len(shard.heap or ()) for shard in shards) < 100
    assert len(deadlines._others._heap) < 100
