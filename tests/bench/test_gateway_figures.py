"""How bench.gateway holds contenders against each other."""

from pathlib import Path

import pytest

from bench.figures import cpu_s
from bench.gateway import Contender, Figures, summary

NONE = 4_194_305  # above any process id that Linux gives


def one_round(us_per_request: float, ttft_ms: float) -> Figures:
    return {
        "us_per_request": us_per_request,
        "us_per_token": 10.0,
        "ttft_ms_p50": ttft_ms,
        "ttft_ms_p99": 2 * ttft_ms,
    }


def contender(name: str, *rounds: tuple[float, float]) -> Contender:
    return Contender(name, rounds=[one_round(*figures) for figures in rounds])


def test_ratios_are_of_one_round_and_not_of_medians() -> None:
    """The machine's speed is another in each round; the ratio of the medians would be 4."""
    found = summary(
        [
            contender("direct", (0.0, 1.0), (0.0, 2.0), (0.0, 0.5)),
            contender("headway", (100.0, 3.0), (200.0, 6.0), (60.0, 1.5)),
            contender("litserve", (500.0, 2.0), (400.0, 4.0), (180.0, 1.0)),
        ]
    )
    peers, ratios = found["peers"], found["times_headway"]
    assert isinstance(peers, dict)
    assert isinstance(ratios, dict)
    assert peers["litserve"]["us_per_request"] == 400.0
    assert peers["headway"]["ttft_added_ms_p50"] == 2.0
    assert ratios.keys() == {"headway", "litserve"}
    costs = {"median": 3.0, "least": 2.0, "greatest": 5.0}
    assert ratios["litserve"]["us_per_request"] == costs


def test_one_that_failed_has_a_reason_and_no_figures() -> None:
    """Also where it failed in the middle of a round."""
    dead = contender("litellm", (300.0, 2.0))
    dead.fail(RuntimeError("it does not start"))
    found = summary([contender("direct", (0.0, 1.0)), contender("headway", (1.0, 1.0)), dead])
    peers, ratios = found["peers"], found["times_headway"]
    assert isinstance(peers, dict)
    assert isinstance(ratios, dict)
    assert peers["litellm"] == {"reason": "RuntimeError('it does not start')"}
    assert "litellm" not in ratios
    assert "times_headway_compiled" not in found


def test_what_is_compared_with_may_not_fail() -> None:
    with pytest.raises(RuntimeError, match="no port"):
        Contender("headway").fail(RuntimeError("no port"))


def test_the_time_of_a_process_that_is_not_there() -> None:
    assert not Path(f"/proc/{NONE}").exists()
    with pytest.raises(ProcessLookupError):
        cpu_s(NONE)
