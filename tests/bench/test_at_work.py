"""The steps of an executor at work."""

from pathlib import Path

from bench.sim.at_work import drawn, step_log
from bench.sim.calibrate import read


def test_every_token_of_every_request_is_in_the_log(tmp_path: Path) -> None:
    """The first token of each comes with its prompt's last chunk."""
    path = tmp_path / "steps.jsonl"
    step_log(path, "mock", "", num_threads=1, num_requests=24)
    steps, asks = read(path, "ms"), drawn(24)
    assert sum(step.num_prefilled for step in steps) == sum(len(ask.prompt) for ask in asks)
    assert sum(step.num_decoded for step in steps) == sum(ask.num_tokens - 1 for ask in asks)
    assert any(step.num_decoded and step.num_prefilled for step in steps), "nobody joined"
