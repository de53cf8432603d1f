"""Every family equals transformers in every way of running; see equality.py for the whole table."""

from pathlib import Path

import pytest

from tests.engine.conftest import CHECKPOINTS
from tests.engine.equality import HEADER, Mode, compare, table

# The others share the engine with these, so that what differs is run with everything on and off.
IN_ALL_MODES = ("qwen3", "llama")
EVERYTHING = Mode(prefix_caching=True, chunked=True, preempted=True, num_samples=3)
NOTHING = Mode(prefix_caching=False, chunked=False, preempted=False, num_samples=1)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_all_ways_of_running_equal_transformers(checkpoints: dict[str, Path], name: str) -> None:
    rows = compare(checkpoints[name], None if name in IN_ALL_MODES else (EVERYTHING, NOTHING))
    print(f"\n{HEADER}\n{table(name, rows)}")
    assert all(row.is_equal for row in rows)
