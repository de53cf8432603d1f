"""Sessions and prefixes: what is remembered, of whom, how much, and for how long."""

import gc

from hypothesis import example, given
from hypothesis import strategies as st

from scheduler_svc.core.affinity import (
    MAX_HITS,
    PrefixIndex,
    Session,
    Sessions,
    Stretch,
    Tally,
)
from scheduler_svc.core.fairness import Account, Fairness


def sessions(max_sessions: int = 100) -> Sessions:
    return Sessions(ttl_ms=300_000, max_sessions=max_sessions)


def chain(*blocks: str) -> tuple[int, ...]:
    """Chained hashes of a prompt's blocks, as the gateway's words stand for tokens."""
    return tuple(hash(blocks[: number + 1]) for number in range(len(blocks)))


# --- sessions -------------------------------------------------------------------------------


def test_who_served_a_session_is_preferred() -> None:
    known = sessions()
    assert known.preferred("t", "s", "A", 0) is None
    known.served("t", "s", "A", "e1", 0)
    assert known.preferred("t", "s", "A", 1) == "e1"


def test_the_executor_that_served_last_is_the_new_preference() -> None:
    known = sessions()
    known.served("t", "s", "A", "e1", 0)
    known.served("t", "s", "A", "e2", 1)
    assert known.preferred("t", "s", "A", 2) == "e2"


def test_an_idle_session_is_forgotten_and_use_keeps_it() -> None:
    known = sessions()
    known.served("t", "s", "A", "e1", 0)
    known.served("t", "s", "A", "e1", 200_000)
    assert known.preferred("t", "s", "A", 499_999) == "e1"
    assert known.preferred("t", "s", "A", 500_000) is None
    known.served("t", "other", "A", "e1", 500_000)
    assert len(known) == 1


def test_a_session_that_was_forgotten_is_neither_hit_nor_miss() -> None:
    known = sessions()
    known.served("t", "s", "A", "e1", 0)
    known.served("t", "s", "A", "e2", 300_000)
    known.served("t", "s", "A", "e2", 600_000)
    assert (known.tally("e1"), known.tally("e2")) == (Tally(), Tally())


def test_sessions_of_tenants_and_models_are_apart() -> None:
    known = sessions()
    known.served("t", "s", "A", "e1", 0)
    assert known.preferred("thief", "s", "A", 1) is None
    assert known.preferred("t", "s", "B", 1) is None


def test_no_session_id_is_no_session() -> None:
    known = sessions()
    known.served("t", "", "A", "e1", 0)
    assert known.preferred("t", "", "A", 1) is None
    assert known.tally("e1") == Tally()


def test_sessions_are_bounded_and_the_longest_idle_goes() -> None:
    known = sessions(max_sessions=2)
    for name in ("s1", "s2", "s1", "s3"):
        known.served("t", name, "A", "e1", 0)
    assert len(known) == 2
    assert known.preferred("t", "s2", "A", 0) is None
    assert known.preferred("t", "s1", "A", 0) == "e1"


def test_a_miss_is_charged_to_the_preferred_executor() -> None:
    known = sessions()
    known.served("t", "s", "A", "e1", 0)
    known.served("t", "s", "A", "e1", 1)
    known.served("t", "s", "A", "e2", 2)
    known.served("t", "s", "A", "e2", 3)
    assert known.tally("e1") == Tally(num_hits=1, num_misses=1)
    assert known.tally("e2") == Tally(num_hits=1, num_misses=0)


def test_tallies_of_executors_that_are_gone_are_gone() -> None:
    known = sessions()
    known.served("t", "s", "A", "e1", 0)
    known.drop_executor("e1")
    known.served("t", "s", "A", "e2", 1)
    assert known.tally("e1") == Tally()


def test_what_is_forgotten_leaves_no_garbage() -> None:
    """The collector seldom looks at what is old."""

    def num_alive() -> int:
        kinds = (Session, Stretch, Account)
        return sum(type(each) in kinds for each in gc.get_objects())

    gc.collect()
    before = num_alive()
    known, index, fairness = sessions(max_sessions=3), PrefixIndex(4), Fairness({}, 0, 3)
    gc.disable()
    try:
        for number in range(100):
            known.served("t", f"s{number}", "A", "e1", 0)
            index.add("e1", chain(f"{number}", "b"))
            fairness.charge((0, "A"), f"t{number}", 10)
            fairness.correct((0, "A"), f"t{number}", 10, 10)
        assert num_alive() - before == 3 + 2 + 3
    finally:
        gc.enable()


# --- prefixes -------------------------------------------------------------------------------


def test_the_number_of_leading_blocks_is_counted_for_each_executor() -> None:
    index = PrefixIndex(100)
    index.add("e1", chain("a", "b", "c"))
    index.add("e2", chain("a", "x"))
    found = index.longest(chain("a", "b", "c", "d"))
    assert found == {"e1": 3, "e2": 1}
    assert list(found) == ["e1", "e2"]
    assert index.longest(chain("b")) == {}
    assert index.longest(()) == {}


def test_one_block_in_common_is_not_a_common_prefix() -> None:
    index = PrefixIndex(100)
    index.add("e1", chain("hello", "continue"))
    assert index.longest(chain("goodbye", "continue")) == {}


def test_blocks_are_bounded_and_a_chain_loses_its_end_first() -> None:
    index = PrefixIndex(4)
    index.add("e1", chain("a", "b", "c"))
    index.add("e2", chain("x", "y"))
    assert len(index) == 4
    assert index.longest(chain("a", "b", "c")) == {"e1": 2}
    assert index.longest(chain("x", "y")) == {"e2": 2}


def test_a_dropped_executor_is_named_no_more() -> None:
    index = PrefixIndex(100)
    index.add("e1", chain("a", "b"))
    index.add("e2", chain("a"))
    index.drop_executor("e1")
    index.drop_executor("unknown")
    assert index.longest(chain("a", "b")) == {"e2": 1}
    index.add("e1", chain("a"))
    assert index.longest(chain("a", "b")) == {"e1": 1, "e2": 1}


def test_an_answer_is_bounded() -> None:
    index = PrefixIndex(100)
    for number in range(200):
        index.add(f"e{number}", chain("a"))
    index.add("e150", chain("a", "b"))
    found = index.longest(chain("a", "b"))
    assert len(found) == MAX_HITS
    assert next(iter(found.items())) == ("e150", 2)


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(("add", "add", "drop")),
            st.integers(0, 400),
            st.lists(st.sampled_from("ab"), min_size=1, max_size=4),
        ),
        max_size=60,
    ),
    asked=st.lists(st.sampled_from("ab"), max_size=5),
    num_restarts=st.integers(0, 150),
)
def test_the_index_is_what_was_added_and_not_dropped(
    steps: list[tuple[str, int, list[str]]], asked: list[str], num_restarts: int
) -> None:
    """Against plain sets, over many executors that come and go (bits are used again)."""
    index = PrefixIndex(1_000)
    caches: dict[str, set[int]] = {}
    for number in range(num_restarts):
        index.add(f"old{number}", chain("a"))
        index.drop_executor(f"old{number}")
    for kind, number, blocks in steps:
        name = f"e{number % 7}"
        if kind == "add":
            index.add(name, chain(*blocks))
            caches.setdefault(name, set()).update(chain(*blocks))
        else:
            index.drop_executor(name)
            caches.pop(name, None)
    expected = {}
    for name, cache in caches.items():
        num_blocks = 0
        while num_blocks < len(asked) and chain(*asked)[num_blocks] in cache:
            num_blocks += 1
        if num_blocks:
            expected[name] = num_blocks
    assert index.longest(chain(*asked)) == expected


@given(
    added=st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.sampled_from("abc"), min_size=1, max_size=7)),
        max_size=80,
    ),
    max_blocks=st.integers(1, 25),
)
def test_stretches_forget_what_single_blocks_would_forget(
    added: list[tuple[int, list[str]]], max_blocks: int
) -> None:
    index = PrefixIndex(max_blocks)
    # block -> who has it, longest not added first
    known: dict[int, set[str]] = {}
    for number, blocks in added:
        index.add(f"e{number}", chain(*blocks))
        for block in reversed(chain(*blocks)):
            known[block] = known.pop(block, set()) | {f"e{number}"}
        while len(known) > max_blocks:
            del known[next(iter(known))]
        assert len(index) == len(known)
        for _, asked in added:
            hashes = chain(*asked)
            expected = dict.fromkeys((f"e{number}" for number in range(6)), 0)
            for executor_id in expected:
                has = [executor_id in known.get(block, ()) for block in hashes]
                expected[executor_id] = (*has, False).index(False)
                assert index.has_any(executor_id, hashes) is has[0]
            assert index.longest(hashes) == {name: num for name, num in expected.items() if num}


@example([(1, 2, 1), (2, 1, 3), (3, 2)], 2)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple), max_size=30),
    st.integers(1, 6),
)
def test_hashes_that_are_no_chains_do_no_harm(
    prefixes: list[tuple[int, ...]], max_blocks: int
) -> None:
    index = PrefixIndex(max_blocks)
    for number, prefix in enumerate(prefixes):
        index.add(f"e{number % 2}", prefix)
        assert 0 < len(index) <= max_blocks
        assert all(num <= len(prefix) for num in index.longest(prefix).values())


def test_one_executor_is_asked_for_the_beginning_of_a_prompt() -> None:
    index = PrefixIndex(100)
    index.add("e1", (1, 2, 3))
    index.add("e2", (9,))
    assert index.has_any("e1", (1, 7))
    assert not index.has_any("e1", ())
    assert not index.has_any("e2", (1,))
    assert not index.has_any("unknown", (1,))
    index.drop_executor("e1")
    assert not index.has_any("e1", (1,))
    index.add("e1", (9,))
    assert not index.has_any("e1", (1,))
