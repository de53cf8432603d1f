"""Rank, warmth and bands: one number for each request, and what later bands are owed."""

import random

from scheduler_svc.core import priority
from scheduler_svc.core.bands import Shares
from scheduler_svc.core.domain import CoreSettings, ExecutorRecord, Residence
from tests.core.scheduler.helpers import granted
from tests.core.scheduler.test_scenarios import World


def test_the_value_of_the_bonus_changes_nothing_but_its_unit() -> None:
    """W3: any bonus above 0 gives the same order, the one of the published formula."""
    rng = random.Random(3)
    for bonus in (1.0, 10.0, 1_000.0):
        settings = CoreSettings(warm_bonus=bonus, aging_equalization_ms=30_000)
        now_ms = 500_000
        for _ in range(200):
            waits = [(rng.randrange(120_000), rng.choice((0.0, 0.5, 1.0))) for _ in range(8)]
            keys = [
                (now_ms - waited) * priority.ARRIVALS_PER_MS - priority.shift(settings, warmth)
                for waited, warmth in waits
            ]
            points = [priority.points(settings, *wait) or 0.0 for wait in waits]
            assert sorted(range(8), key=lambda i: keys[i]) == sorted(
                range(8), key=lambda i: -round(points[i], 9)
            )


def test_without_a_bonus_there_is_neither_shift_nor_priority() -> None:
    settings = CoreSettings(warm_bonus=0)
    assert priority.shift(settings, 1.0) == 0
    assert priority.points(settings, 1_000, 1.0) is None


def test_arrival_numbers_grow_with_time_and_never_tie() -> None:
    """W2: a burst in one millisecond has an order of its own, fixed for good."""
    numbers = [0]
    for now_ms in (5, 5, 5, 6, 6, 900):
        numbers.append(priority.arrival_number(numbers[-1], now_ms))
    assert numbers == sorted(set(numbers))
    assert [number >> priority.ARRIVAL_BITS for number in numbers[1:]] == [5, 5, 5, 6, 6, 900]


def test_warmth_counts_where_the_request_could_run() -> None:
    """W11: a home counts, a load counts half, an executor that drains for another not at all."""
    world = World(load_ms=1_000)
    world.backend("b1", 1, "A", max_models=1, resident="A")
    fleet = world.core._state.fleet
    assert (fleet.warmth("A"), fleet.warmth("B")) == (1.0, 0.0)
    world.backend("b2", 2, "AB", max_models=1, resident="A")
    world.run("A", "b1")
    world.run("A", "b2")
    world.ask("B")
    assert world.reservation("b2") == "B"
    assert list(fleet.homes["A"]) == ["b1"]
    world.backend("b3", 1, "B")
    assert fleet.warmth("B") == 0.5
    world.advance(1_001)
    assert fleet.warmth("B") == 1.0


def test_a_band_gets_its_share_of_the_grants_while_others_wait() -> None:
    world = World(band_min_shares=(0.0, 0.25), band_max_wait_ms=(), num_bands=2)
    world.backend("b1", 1, "A", resident="A")
    [running] = world.run("A", "b1")
    late = world.ask("AAAA", band=1)
    world.ask("A" * 30, band=0)
    order = []
    for _ in range(17):
        [(running, _)] = granted(world.done(running))
        order.append(running in late)
    assert sum(order) == 4
    assert order[:3] == [False] * 3


def test_a_wide_head_gets_the_share_of_its_band_too() -> None:
    """One slot comes free at a time and is never enough: owed a grant, it keeps what comes free."""
    world = World(band_min_shares=(0.0, 0.25), band_max_wait_ms=(), num_bands=2)
    world.backend("b1", 4, "A", resident="A")
    running = world.run("AAAA", "b1")
    [wide] = world.ask("A", band=1, num_samples=4)
    world.ask("A" * 30, band=0)
    order: list[str] = []
    while wide not in order:
        assert len(order) < 10, "it starves"
        sent = world.done(running.pop(0))
        order += [name for name, _ in granted(sent)]
        running += [name for name, _ in granted(sent)]
    assert (order.index(wide), running) == (5, [wide])
    assert len(granted(world.done(wide))) == 4


def test_a_band_is_owed_nothing_for_grants_that_it_does_not_compete_for() -> None:
    """With one account for the whole fleet the many grants of B would earn band 1 every slot of A,
    and band 0 of A would wait for ever, older and first as it is."""
    world = World(band_min_shares=(0.0, 0.25), band_max_wait_ms=(), num_bands=2)
    world.backend("b1", 1, "A", resident="A")
    world.backend("b2", 1, "B", resident="B")
    [running] = world.run("A", "b1")
    [other] = world.run("B", "b2")
    urgent = world.ask("A" * 10, band=0)
    world.ask("A" * 30, band=1)
    world.ask("B" * 100, band=0)
    order = []
    for _ in range(12):
        for _ in range(4):
            [(other, _)] = granted(world.done(other))
        [(running, _)] = granted(world.done(running))
        order.append(running in urgent)
    assert order == [True] * 4 + [False, True, True, True] * 2


def test_models_that_share_an_executor_share_what_it_owes() -> None:
    world = World(band_min_shares=(0.0, 0.25), band_max_wait_ms=(), num_bands=2)
    world.backend("b1", 1, "AB", max_models=2, resident="AB")
    [running] = world.run("A", "b1")
    late = world.ask("B" * 10, band=1)
    world.ask("A" * 30, band=0)
    order = []
    for _ in range(12):
        [(running, _)] = granted(world.done(running))
        order.append(running in late)
    assert order == [False] * 4 + [True, False, False, False] * 2


def test_shares_are_credit_only_while_somebody_waits() -> None:
    shares = Shares(CoreSettings(num_bands=2, band_min_shares=(0.0, 0.5)))
    executor = ExecutorRecord("e1", "i1", 1, residences={"A": Residence(), "B": Residence()})
    both, elsewhere = [{"A": 0}, {"B": 0}], [{"A": 0}, {"C": 0}]
    shares.granted(executor, 0, both)
    assert executor.owed_band is None
    shares.granted(executor, 0, elsewhere)
    shares.granted(executor, 0, both)
    assert executor.owed_band is None
    shares.granted(executor, 0, both)
    assert executor.owed_band == 1
    shares.granted(executor, 1, both)
    assert executor.owed_band is None


def test_grants_that_a_model_at_its_limit_could_not_have_earn_nothing_for_it() -> None:
    """A has one lease at a time, and three grants of B come between two of its own. They would earn
    band 1, which waits for A alone, every one of these."""
    world = World(
        band_min_shares=(0.0, 0.25), band_max_wait_ms=(), num_bands=2, model_limits={"A": 1}
    )
    world.backend("b1", 2, "AB", max_models=2, resident="AB")
    [running] = world.run("A", "b1")
    [other] = world.run("B", "b1")
    urgent = world.ask("A" * 10, band=0)
    world.ask("A" * 30, band=1)
    world.ask("B" * 100, band=0)
    order = []
    for _ in range(12):
        for _ in range(3):
            [(other, _)] = granted(world.done(other))
        [(running, _)] = granted(world.done(running))
        order.append(running in urgent)
    assert order == [True] * 4 + [False, True, True, True] * 2


def test_what_a_band_earned_before_a_model_came_does_not_count_for_it() -> None:
    """B's turns on b1 are one grant long. What band 1 earned with A's grants would be all of them,
    and band 0 of B would wait for ever, older as it is."""
    world = World(
        band_min_shares=(0.0, 0.25), band_max_wait_ms=(), num_bands=2, equalization_ms=1_000
    )
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    [running] = world.run("A", "b1")
    world.ask("A" * 30, band=1)
    world.ask("A" * 4, band=0)
    for _ in range(4):
        world.advance(100)
        [(running, _)] = granted(world.done(running))
    [urgent] = world.ask("B", band=0)
    world.ask("B" * 4, band=1)
    world.advance(1_001)
    world.done(running)
    assert world.place(urgent) == "b1"


def test_a_band_that_got_what_it_was_owed_is_owed_no_more() -> None:
    """Also when nobody of another band waits any more: A, which has no place and whose turn it is,
    would never be loaded beside an endless stream of B."""
    world = World(
        band_min_shares=(0.0, 0.25), band_max_wait_ms=(), num_bands=2, equalization_ms=1_000
    )
    world.backend("b1", 1, "ABC", max_models=2, resident="BC")
    [running] = world.run("B", "b1")
    world.ask("B" * 30, band=1)
    world.ask("B" * 4, band=0)
    for _ in range(4):
        [(running, _)] = granted(world.done(running))
    [rare] = world.ask("A", band=1)
    world.advance(1_001)
    for _ in range(2):
        [(running, _)] = granted(world.done(running))
    assert running == rare


def test_a_request_older_than_its_bands_limit_goes_next() -> None:
    world = World(band_min_shares=(), band_max_wait_ms=(10_000, 2_000), num_bands=2)
    world.backend("b1", 1, "A", resident="A")
    [running] = world.run("A", "b1")
    first, second = world.ask("AA", band=1)
    world.advance(1_999)
    urgent = world.ask("AA", band=0)
    assert granted(world.done(running)) == [(urgent[0], "b1")]
    world.advance(10)
    assert granted(world.done(urgent[0])) == [(first, "b1")]
    assert granted(world.done(first)) == [(second, "b1")]
    assert granted(world.done(second)) == [(urgent[1], "b1")]


def test_a_claim_is_the_sum_of_waits_over_the_places_there_would_be() -> None:
    settings = CoreSettings(aging_equalization_ms=30_000)
    one_ms = priority.ARRIVALS_PER_MS

    def age_ms(num_places: int, *waits_ms: int) -> float:
        """As old as this a lone head would have to be, beyond what warmth is worth."""
        claim = priority.claim(settings, waits_ms[0], sum(waits_ms), num_places, waits_ms[0])
        return claim / one_ms + waits_ms[0] - 30_000

    assert age_ms(1, 4_000, 2_000) == 3_000
    assert age_ms(3, 4_000, 2_000) == 1_500
    assert age_ms(0, 4_000, 2_000) == 6_000 + 30_000, "a first place counts E more"
    assert age_ms(0, 29_999) < 100_000 < age_ms(0, 30_000), "and is due after E"
    assert age_ms(1, 30_000) == 15_000


def test_models_without_a_place_take_turns_after_e() -> None:
    """By the age of heads, one with an old backlog would go first whenever it lost a place."""
    settings = CoreSettings(aging_equalization_ms=30_000)

    def key(head_waited_ms: int, placeless_ms: int) -> int:
        claim = priority.claim(settings, head_waited_ms, head_waited_ms, 0, placeless_ms)
        return -head_waited_ms * priority.ARRIVALS_PER_MS - claim

    assert key(100_000, 100_000) < key(900_000, 60_000) < key(40_000, 40_000)


def test_an_idle_executor_goes_where_most_is_waited() -> None:
    """One old request against three younger ones that waited longer together."""
    world = World(load_ms=1_000)
    world.backend("b1", 1, "ABC", max_models=1, resident="A")
    [running] = world.run("A", "b1")
    world.ask("B")
    world.advance(4_000)
    world.ask("CCC")
    world.advance(3_000)
    world.done(running)
    assert world.row("b1").loading_model == "C", "9 s against 7 s"


def test_a_cold_model_that_aged_goes_before_any_backlog() -> None:
    world = World(load_ms=1_000, equalization_ms=5_000)
    world.backend("b1", 1, "ABC", max_models=1, resident="A")
    [running] = world.run("A", "b1")
    world.ask("B")
    world.advance(2_000)
    world.ask("CCCCCC")
    world.advance(3_000)
    world.done(running)
    assert world.row("b1").loading_model == "B", "5 s against 18 s"


def test_an_overdue_head_counts_as_of_the_first_band_and_there_its_age_decides() -> None:
    world = World(band_min_shares=(), band_max_wait_ms=(10_000, 2_000), num_bands=2)
    world.backend("b1", 1, "A", resident="A")
    [running] = world.run("A", "b1")
    [older] = world.ask("A", band=0)
    world.advance(100)
    [overdue] = world.ask("A", band=1)
    world.advance(2_000)
    [younger] = world.ask("A", band=0)
    assert granted(world.done(running)) == [(older, "b1")]
    assert granted(world.done(older)) == [(overdue, "b1")]
    assert granted(world.done(overdue)) == [(younger, "b1")]


def test_a_wide_head_that_is_overdue_keeps_its_claim_against_who_comes_in_an_earlier_band() -> None:
    """Nobody of band 0 waits when a slot comes free: its next request comes a moment later."""
    world = World(num_bands=2, band_max_wait_ms=(), equalization_ms=400)
    world.backend("b1", 2, "BC", max_models=2, resident="BC")
    running = world.run("BB", "b1")
    world.ask("C", band=1, num_samples=2)
    world.done(running.pop(0))
    running += world.ask("B", band=0)
    assert world.place(running[-1]) == "b1", "before the limit of its band it yields"

    world = World(num_bands=2, band_max_wait_ms=(500, 300), equalization_ms=400)
    world.backend("b1", 2, "BC", max_models=2, resident="BC")
    running = world.run("BB", "b1")
    [wide] = world.ask("C", band=1, num_samples=2)
    world.advance(301)
    for _ in range(2):
        world.done(running.pop(0))
        world.ask("B", band=0)
    assert world.place(wide) == "b1"


def test_seats_that_a_load_kept_for_a_wide_head_stay_its_own() -> None:
    """The model came for it; a younger one of an earlier band, which needs one seat, took it."""
    world = World(num_bands=2, band_max_wait_ms=(500, 50), load_ms=1_000)
    world.backend("b1", 2, "AC", max_models=2, resident="A")
    [running] = world.run("A", "b1")
    [wide] = world.ask("C", band=1, num_samples=2)
    [young] = world.ask("C", band=0)
    world.advance(1_001)
    assert world.places(wide, young) == [None, None]
    world.done(running)
    assert world.place(wide) == "b1"


def test_a_claim_is_worth_no_more_than_its_head_is_now() -> None:
    """The wide head was overdue by the age of an older request behind it, which gave up. Its claim
    must not go on barring who is before it again: it would itself not be tried behind that one."""
    world = World(num_bands=2, band_max_wait_ms=(300, 500), equalization_ms=400)
    world.backend("b1", 3, "A", resident="A")
    running = world.ask("AA", band=1, tenant="served")
    [old] = world.ask("A", band=1, tenant="served", num_samples=2)
    world.advance(950)
    [wide] = world.ask("A", band=1, num_samples=2)
    world.advance(10)
    assert world.row("b1").reservation is not None
    world.cancel(old, "served")
    [urgent] = world.ask("A", band=0)
    assert world.place(urgent) == "b1"
    world.done(*running)
    assert world.place(wide) == "b1"


def test_whoever_waits_behind_young_heads_lends_their_flow_its_age() -> None:
    """Each head of A hangs up before it is as old as that of C, which shares their home."""
    world = World(equalization_ms=5_000)
    world.backend("b1", 1, "AC", max_models=2, resident="AC")
    [running] = world.run("A", "b1")
    [old] = world.ask("A")
    order, [young] = [], world.ask("A", tenant="young")
    world.advance(100)
    for _ in range(7):
        world.ask("C")
        world.advance(600)
        world.cancel(young, tenant="young")
        [young] = world.ask("A", tenant="young")
        world.advance(400)
        [(running, _)] = granted(world.done(running))
        order.append(running)
        if running == young:
            [young] = world.ask("A", tenant="young")
    assert order[:5] == ["C1", "C2", "C3", "C4", "C5"], "for E"
    assert order[6] == old, "after who is first in the flow"


def test_what_a_band_may_save_up_and_owe_is_bounded() -> None:
    """Two grants at most are saved for it, and its debt ends at one, however many it got."""
    both = [{"A": 0}, {"A": 0}]

    def owed_after(num_first: int, num_second: int) -> tuple[int, int]:
        """So many grants of band 0, then of band 1: how many more band 1 is owed at once, or after
        how many grants of band 0 it is owed one."""
        shares = Shares(CoreSettings(num_bands=2, band_min_shares=(0.0, 0.5)))
        executor = ExecutorRecord("e1", "i1", 1, residences={"A": Residence()})
        for band, num in ((0, num_first), (1, num_second)):
            for _ in range(num):
                shares.granted(executor, band, both)
        num_more = num_until = 0
        while executor.owed_band == 1 and num_more < 20:
            shares.granted(executor, 1, both)
            num_more += 1
        while executor.owed_band != 1 and num_until < 20:
            shares.granted(executor, 0, both)
            num_until += 1
        return num_more, num_until

    assert owed_after(2, 0) == (1, 1)
    assert owed_after(100, 0)[0] == 2
    assert owed_after(0, 100) == (0, 4)


def test_a_place_that_is_on_its_way_counts_as_one() -> None:
    world = World(load_ms=10_000)
    world.backend("b1", 1, "A")
    world.ask("A")
    world.advance(2_000)
    world.ask("A")
    world.advance(2_000)
    waking = world.core._state.waking
    claim = priority.claim(CoreSettings(), 4_000, 4_000 + 2_000, 1, 4_000)
    assert world.row("b1").loading_model == "A"
    assert waking._bonus("A") == claim


def test_a_model_is_due_by_its_head_or_by_its_oldest_request_less_e() -> None:
    world = World(equalization_ms=5_000)
    world.backend("b1", 1, "AB", max_models=1, resident="A")
    world.run("A", "b1")
    world.ask("B", band=1)
    world.advance(7_000)
    [young] = world.ask("B", band=0)
    state = world.core._state
    head = state.queue.head("B")
    assert head is not None
    assert head.request.request_id == young
    assert state.waking._due_ms(head) == 2_000
    world.advance(3_000)
    assert state.waking._due_ms(head) == 5_000
