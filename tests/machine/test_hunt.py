"""A few runs of the hunt: the same ones each time."""

import random

import pytest

from tests.machine import hunt


@pytest.mark.parametrize("seed", range(8))
def test_no_promise_is_broken(seed: int) -> None:
    hunt.play(hunt.steps(random.Random(seed), num_steps=20))


def test_a_broken_promise_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    run = hunt.steps(random.Random(1), num_steps=20)
    bad = [step for step in run if step[0] in ("start", "stream")][:3]
    monkeypatch.setattr(hunt, "breaks", lambda steps: all(step in steps for step in bad))
    assert hunt.shortened(run) == bad
