"""Figures, tables and the page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.sim.__main__ import main
from bench.sim.journal import Record
from bench.sim.metrics import deal_out, eta, fairness
from bench.sim.traces import FILES, is_there, read_trace
from tests.sim.helpers import job


def test_nobody_is_dealt_more_than_asked_for() -> None:
    fair = deal_out({"small": 1.0, "middle": 5.0, "hog": 100.0}, 13.0)
    assert fair == {"small": 1.0, "middle": 5.0, "hog": 7.0}
    assert deal_out({"a": 10.0, "b": 10.0}, 8.0) == {"a": 4.0, "b": 4.0}


def test_a_tenant_that_gets_half_of_its_fair_share_is_the_worst() -> None:
    records = []
    for number in range(40):
        tenant = "first" if number % 2 else "second"
        is_done = number % 2 or number % 4 == 0
        record = Record(replace(job(number, 0), tenant=tenant))
        record.outcome, record.ended_ms = ("OK", 1_000) if is_done else ("QUEUE_TIMEOUT", 9_000)
        records.append(record)
    worst, jain, shares = fairness(records, seconds=10)
    # 30 of 40 done, so 15 each is fair
    assert shares == {"first": pytest.approx(20 / 15), "second": pytest.approx(10 / 15)}
    assert worst == pytest.approx(10 / 15)
    assert jain == pytest.approx(900 / (2 * 500))


def test_estimates_are_held_against_the_real_wait() -> None:
    records = []
    for number, (said_ms, real_ms) in enumerate([(1_000, 1_000), (3_000, 2_000), (0, 4_000)]):
        record = Record(job(number, 500), granted_ms=500 + real_ms)
        record.has_waited, record.estimated_wait_ms = True, said_ms
        records.append(record)
    figures = eta(records)
    assert figures is not None
    assert figures["bias_s"] == pytest.approx(-1.0)
    thirds = [figures[f"{name}_bias_s"] for name in ("first", "middle", "last")]
    assert thirds == pytest.approx([0.0, 1.0, -4.0])
    assert figures["share_within_25_percent"] == pytest.approx(1 / 3)
    assert eta([Record(job(0, 0))]) is None


def test_the_command_prints_tables_a_picture_and_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "sim.html"
    words = ["--load", "50", "--seeds", "1", "--seconds", "60", "--processes", "1"]
    assert main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "load 50 %" in printed
    figures = json.loads(printed.splitlines()[-1])["policies"]["headway"]["50"]
    assert figures["mean_wait_s"] >= 0
    assert len(figures["log_hash"]) == 64
    page = out.read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("</svg>") == 7
    assert "http" not in page


@pytest.mark.parametrize(
    ("words", "seeds"), [(["--seeds", "2"], "1,2"), (["--seed", "7"], "7")], ids=["many", "one"]
)
def test_the_last_line_names_the_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], seeds: str
) -> None:
    few = ["--load", "30", "--seconds", "20", "--processes", "1", "--policies", "headway"]
    assert main([*few, *words, "--out", str(tmp_path / "sim.html")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seeds"] == seeds


def test_the_big_run_says_what_the_core_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scale", "--requests", "3000", "--load", "60"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["num_unfinished"] == 0
    assert figures["policy_us_per_event"] > 0


@pytest.mark.parametrize("trace", list(FILES))
def test_a_trace_is_read_in_order_or_skipped(trace: str) -> None:
    if not is_there(trace):
        assert main(["--trace", trace]) == 0
        return
    rows = read_trace(trace)
    assert len(rows) > 1_000
    assert [row.at_s for row in rows] == sorted(row.at_s for row in rows)
    assert min(min(row.num_prompt_tokens, row.num_output_tokens) for row in rows) > 0
