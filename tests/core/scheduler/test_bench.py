"""The core's benchmark runs, and its last line can be read."""

import json

import pytest

from bench.core.__main__ import main


def test_the_quick_benchmark_ends_with_its_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["core", "--quick"])
    main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key in ("decisions_per_s", "grants_per_s", "p50_us", "p99_us", "max_ms"):
        assert figures[key] > 0
    assert figures["mean_ratio_1m_to_1k"] > 0
    assert figures["reference_ratio"] > 0
    for row in figures["headway"]:
        # every end is followed by a grant, on the whole: the queue keeps its length
        assert row["grants_per_end"] == pytest.approx(1, abs=0.2)
