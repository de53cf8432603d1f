"""Every target of the Makefile runs: its own command line, in small.

What a benchmark promises is one JSON object in its last line, with the figures that its docstring
and docs/perf.md speak of, all of them finite. How large they are is no matter here.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from bench.gateway_peers import PEERS_BIN
from bench.stack import ROOT, Stack
from tests.bench.targets import described, figures_of, output_of, recipe

TOUR_MODEL = "headway/tour"
ELSEWHERE = {
    "run": "tests/process/test_make_run.py",
    "fuzz": "tests/process/test_openapi.py",
    "gpu": "tests/bench/test_gpu_report.py",
    "test": "what runs this",
    "lint": "a part of make test",
    "types": "a part of make test",
    "proto": "a part of every installation",
}


def positive(figures: dict[str, Any], *names: str) -> None:
    for name in names:
        assert figures[name] > 0, (name, figures)


def test_relay() -> None:
    figures = figures_of("bench-relay", "--streams=4", "--tokens=50", "--seconds=0.3")
    positive(figures, "tokens_per_s", "requests_per_s")
    for process in ("scheduler", "gateway", "executor"):
        for unit in ("us_per_token", "cores", "us_per_request"):
            assert figures[f"{process}_{unit}"] >= 0


def test_core() -> None:
    """The compiled one has a test of its own (tests/core/scheduler/test_compiled.py)."""
    figures = figures_of("bench-core", "--quick", "--no-compiled")
    positive(figures, "decisions_per_s", "grants_per_s", "p50_us", "p99_us", "max_ms")
    positive(figures, "mean_ratio_1m_to_1k", "reference_ratio")
    for row in figures["headway"]:
        # every end is followed by a grant, on the whole: the queue keeps its length
        assert row["grants_per_end"] == pytest.approx(1, abs=0.2)


def test_engine() -> None:
    """Beside transformers and over HTTP."""
    figures = figures_of("bench-engine", "--quick", "--batches", "1", "2", "--tokens=3")
    for batch in ("1", "2"):
        positive(figures[batch], "headway_tok_s", "http_tok_s", "transformers_tok_s", "http_share")
        assert list(figures[batch]["http_cpu_ms_per_token"]) == [
            *("executor", "scheduler", "gateway", "client")
        ]
    positive(figures, "headway_first_token_ms", "http_first_token_ms", "bandwidth_gb_s")


def test_exactness() -> None:
    figures = figures_of("bench-exactness", "--quick")
    assert figures["differences"] == 0
    assert [(each["dtype"], each["sequences"]) for each in figures["by_dtype"]] == [
        ("float32", 8),
        ("bfloat16", 8),
    ]


def test_kernels() -> None:
    pytest.importorskip("triton")
    figures = figures_of("bench-kernels", "--quick", "--dtypes=float32")
    assert figures["num_cases"] == 1
    assert figures["is_same_alone"]
    assert figures["is_same_replayed"]
    assert figures["max_error"]["float32"] < 1e-5


def test_eta() -> None:
    """In so short a time nothing may have been estimated yet: then there are no figures of it."""
    figures = figures_of("bench-eta", "--seconds=3", "--load=200")
    positive(figures, "num_requests", "mean_wait_s", "num_positions")
    assert figures["num_unexplained_rises"] == 0
    for side in ("live", "simulated"):
        assert list(figures[side]) == ["cold", "warm"]
        for found in filter(None, figures[side].values()):
            positive(found, "num", "p90_relative_error")
            assert 0 <= found["share_within_25_percent"] <= 1


@pytest.mark.parametrize("peer", ["headway", "sglang_router", "litserve", "litellm"])
def test_gateway(peer: str) -> None:
    if peer != "headway" and not PEERS_BIN.exists():
        pytest.skip("make bench-gateway sets up .venv-peers")
    small = ("--clients=2", "--streams=2", "--tokens=4", "--seconds=0.1", "--rounds=2")
    figures = figures_of("bench-gateway", *small, "--only", peer)
    assert figures["peers"].keys() == {"direct", "headway", peer}
    for row in figures["peers"].values():
        positive(row, "requests_per_s", "tokens_per_s", "ttft_ms_p50", "ttft_ms_p99")
    assert figures["times_headway"].keys() == {"headway", peer}
    same = {"median": 1.0, "least": 1.0, "greatest": 1.0}
    assert figures["times_headway"]["headway"] == {"us_per_request": same, "us_per_token": same}


def test_polls() -> None:
    figures = figures_of("bench-polls", "--samples=3", "--slots=2", "--tokens=5", "--once")
    assert figures["delivered"] == 3
    positive(figures, "sdk_polls", "plain_polls", "delay_ms_p50", "delay_ms_p99")
    assert figures["plain_positions_rose"] == 0


def test_streams() -> None:
    small = ("--streams=4", "--slow=2", "--seconds=0.5", "--step-ms=50", "--write-timeout-s=1")
    figures = figures_of("bench-streams", *small)
    assert figures["cut"] == {"stalled": 2}
    assert figures["came_back"] == 2
    assert figures["lost"] == 0
    positive(figures, "kib_sent_to_each_stopped")
    for part in ("alone", "all_read", "slow_stopped", "slow_back"):
        positive(figures[part], "events")
        assert figures[part]["lag_ms_p99"] >= figures[part]["lag_ms_p50"] >= 0


def test_sim(tmp_path: Path) -> None:
    variables = {"TRACE": "hog", "EXECUTORS": 2, "SEED": 3}
    picture = tmp_path / "sim.html"
    small = ("--seconds=60", "--load=60", "--processes=1", f"--out={picture}")
    figures = figures_of("sim", *small, variables=variables)
    assert (figures["trace"], figures["executors"]) == ("hog", 2)
    for by_load in figures["policies"].values():
        positive(by_load["60"], "mean_wait_s", "goodput", "worst_share", "jain")
    assert picture.stat().st_size > 0


def test_sim_as_it_is() -> None:
    """Without variables nothing is overridden."""
    assert "--" not in recipe("sim")


def test_a_recipe_is_the_same_where_make_runs_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    said = recipe("bench-relay")
    monkeypatch.setenv("MAKELEVEL", "1")
    monkeypatch.setenv("MAKEFLAGS", "w")
    assert recipe("bench-relay") == said


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executors that it starts itself are mock ones here, which are there in a second."""
    with Stack.start(engine="torch", executor={"max_num_seqs": 4}) as stack:
        monkeypatch.setenv("EXECUTOR_ENGINE", "mock")
        monkeypatch.setenv("EXECUTOR_MOCK_MODELS", TOUR_MODEL)
        addresses = (f"--gateway={stack.gateway_url}", f"--scheduler={stack.scheduler_address}")
        said = output_of("demo", *addresses, "--requests=12")
    for number in range(1, 7):
        assert f"\n{number}. " in said
    assert "the same seed again gives the same four samples: True" in said
    assert "each index once and in order: True; attempts: 2" in said


def test_help_lists_every_target() -> None:
    said = dict(line.split(maxsplit=1) for line in output_of("help").splitlines())
    assert said == described()


def test_clean_removes_what_is_made_and_nothing_else() -> None:
    removed = recipe("clean")
    for made in (".venv", ".venv-mint", ".venv-peers", "build", "'*_pb2*'", "__pycache__"):
        assert made in removed
    assert set(re.findall(r"[*/]", removed)) <= {"*"}, "nothing above this folder"


def test_every_target_is_tried() -> None:
    here = {name.removeprefix("test_").split("_")[0] for name in globals() if "test_" in name}
    tried = {f"bench-{name}" for name in here} | here | ELSEWHERE.keys()
    assert not described().keys() - tried
    for path in ELSEWHERE.values():
        assert " " in path or (ROOT / path).exists(), path
