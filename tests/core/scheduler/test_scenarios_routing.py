"""Scenarios 54-58 and 68: where a request runs, sessions, prefixes."""

from scheduler_svc.core.answers import ExecutorStats
from tests.core.scheduler.helpers import granted
from tests.core.scheduler.test_scenarios import World

TTL_MS = 300_000


def spread(**settings: int) -> World:
    """b1(4) and b2(4) with A on both devices."""
    world = World(session_ttl_ms=TTL_MS, **settings)
    world.backend("b1", 4, "A", resident="A")
    world.backend("b2", 4, "A", resident="A")
    return world


def sides(world: World, request_id: str) -> tuple[str, str]:
    """Where it runs, and the other one."""
    home = world.place(request_id)
    assert home is not None
    return home, {"b1": "b2", "b2": "b1"}[home]


def burden(world: World, name: str, models: str = "A") -> list[str]:
    """Have requests run there, while the other one takes nothing."""
    other = {"b1": "b2", "b2": "b1"}[name]
    world.change(other, 0)
    running = world.run(models, name)
    world.change(other, 4)
    return running


def chain(*blocks: str) -> tuple[int, ...]:
    """Chained hashes: each covers its block and all before it."""
    return tuple(hash(blocks[: number + 1]) for number in range(len(blocks)))


def stats(world: World, name: str) -> ExecutorStats:
    found = world.row(name).stats
    assert found is not None
    return found


def test_scenario_54_least_used_share_then_turns_for_each_model() -> None:
    world = World()
    world.backend("half", 2, "A", resident="A")
    world.run("A", "half")
    world.backend("quarter", 4, "A", resident="A")
    world.run("A", "quarter")
    world.run("A", "quarter")  # 1/4 < 1/2

    world = World()
    world.backend("b1", 1, resident="AB")
    world.backend("b8", 8, resident="AB")
    turns: dict[str, list[str | None]] = {"A": [], "B": []}
    for model in "ABBAAB":
        [name] = world.ask(model)
        turns[model].append(world.place(name))
        world.done(name)
    assert turns == {"A": ["b1", "b8", "b1"], "B": ["b1", "b8", "b1"]}

    world.disconnect("b1")
    world.disconnect("b8")
    assert world.places(*world.ask("A")) == [None]  # nobody to choose from: it waits


def test_scenario_55_a_session_prefers_its_executor_and_moves_on_when_it_is_full() -> None:
    world = spread()
    [first] = world.ask("A", session_id="s")
    home, other = sides(world, first)
    world.done(first)
    busy = burden(world, home)
    [second] = world.ask("A", session_id="s")
    assert world.place(second) == home  # 1/4 used there, 0/4 on the other
    busy += burden(world, home, "AA")
    [third] = world.ask("A", session_id="s")
    assert world.place(third) == other
    world.done(second, *busy, third)
    burden(world, other)
    [fourth] = world.ask("A", session_id="s")
    assert world.place(fourth) == other


def test_scenario_56_a_prompt_that_extends_a_known_one_goes_where_that_ran() -> None:
    """Message hashes -> chained hashes of token blocks."""
    world = spread()
    [first] = world.ask("A", num_prompt_tokens=4_096, prefix_hashes=chain("hello", "answer"))
    home, other = sides(world, first)
    world.done(first)
    burden(world, home)
    extended = chain("hello", "answer", "more")
    [follow_up] = world.ask("A", num_prompt_tokens=6_144, prefix_hashes=extended)
    assert world.place(follow_up) == home
    changed = chain("HELLO", "answer", "more")
    [different] = world.ask("A", num_prompt_tokens=6_144, prefix_hashes=changed)
    assert world.place(different) == other


def test_scenario_57_an_expired_session_prefers_nobody_and_nothing_overwrites_nothing() -> None:
    world = spread()
    [first] = world.ask("A", session_id="s", num_prompt_tokens=4_096, prefix_hashes=chain("x"))
    home, other = sides(world, first)
    world.done(first)
    # requests without prefixes and sessions, elsewhere, leave both as they are
    world.change(home, 0)
    world.done(*world.run("A", other))
    world.change(home, 4)
    [again] = world.ask("A", num_prompt_tokens=4_096, prefix_hashes=chain("x"))
    assert world.place(again) == home
    world.done(again)
    world.advance(TTL_MS)
    burden(world, home)
    [late] = world.ask("A", session_id="s")
    assert world.place(late) == other


def test_scenario_58_one_block_in_common_is_no_common_prefix() -> None:
    world = spread()
    [first] = world.ask("A", num_prompt_tokens=4_096, prefix_hashes=chain("mine", "continue"))
    home, other = sides(world, first)
    world.done(first)
    burden(world, home)
    [second] = world.ask("A", num_prompt_tokens=4_096, prefix_hashes=chain("yours", "continue"))
    assert world.place(second) == other


def test_scenario_68_a_miss_is_charged_to_the_preferred_executor() -> None:
    world = World(session_ttl_ms=TTL_MS)
    world.backend("b1", 1, "A", resident="A")
    [first] = world.ask("A", session_id="s")
    world.done(first)
    [hit] = world.ask("A", session_id="s")
    world.done(hit)
    world.run("A", "b1")
    sent = world.backend("b2", 1, "A", resident="A")
    assert granted(sent) == []
    [missed] = world.ask("A", session_id="s")
    assert world.place(missed) == "b2"
    world.done(missed)
    assert stats(world, "b1").affinity == 0.5
    assert stats(world, "b2").affinity is None
