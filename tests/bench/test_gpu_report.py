"""``make gpu`` on tiny shapes, without a GPU: every part says what it promises, or why not."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.__main__ import in_process
from tests.bench.targets import error_of, figures_of


def test_the_gpu_report_has_every_part() -> None:
    pytest.importorskip("triton")
    figures = figures_of("gpu", "--device=cpu", "--quick")
    report, prices = figures["parts"], figures["price_of_exactness"]
    assert list(report) == [
        *("ceilings", "attention", "decode:tiny", "prefill:tiny", "decode-drawn:tiny"),
        *("products:tiny", "engine", "transformers", "switch", "decode-loose:tiny"),
        *("prefill-loose:tiny", "products-loose:tiny", "rows"),
    ]
    assert report["attention"]["is_same"]
    assert report["attention"]["max_error"]["triton float32"] < 1e-5
    assert max(report["attention"]["difference_to_reference"].values()) < 0.05
    assert all(found["num_different"] == 0 for found in report["rows"].values())
    for part, sizes in (("decode:tiny", ("1", "2")), ("prefill:tiny", ("40",))):
        assert all(report[part][size]["tokens_per_s"] > 0 for size in sizes)
    assert {part: list(price) for part, price in prices.items()} == {
        "decode:tiny": ["1", "2"],
        "prefill:tiny": ["40"],
    }
    for part in ("products:tiny", "products-loose:tiny"):
        assert all(share > 0 for shares in report[part].values() for share in shares.values())
    assert report["engine"]["tokens_per_s"] > 0
    assert report["engine"]["tokens_per_s_one_by_one"] > 0
    assert "wants a GPU" in report["transformers"]["skipped"]


@pytest.mark.parametrize(
    "options", [("--part", "decode:none"), ("--part", "nothing"), ("--device", "nowhere")]
)
def test_a_part_that_fails_says_so(options: Sequence[str]) -> None:
    assert "Error" in error_of("gpu", "--device=cpu", "--quick", *options)


def test_a_part_that_hangs_is_ended_and_reported() -> None:
    found = in_process("ceilings", 0, ["--device", "cpu", "--quick"], {})
    assert "ran longer than 0 s" in found["failed"]


def test_what_a_part_that_hangs_has_found_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"], output=b"batch 1: 70 %")

    monkeypatch.setattr(subprocess, "run", run)
    assert in_process("decode:tiny", 9, [], {})["failed"].startswith("ran longer than 9 s")
    assert "batch 1: 70 %" in capsys.readouterr().out


def test_what_the_time_does_not_suffice_for_is_skipped(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    options = ("--device=cpu", "--quick", "--part=prefill:tiny")
    figures = figures_of("gpu", *options, "--budget-s=1", f"--out={out}")
    skipped = {"skipped": "no time was left"}
    assert figures["parts"] == {"ceilings": skipped, "prefill:tiny": skipped}
    assert not out.exists()
    figures = figures_of("gpu", *options, f"--out={out}")
    assert figures == json.loads(out.read_text())
    assert figures["parts"]["prefill:tiny"]["40"]["operations_share"] > 0


def test_the_gpu_report_needs_none_of_the_services_and_no_installation() -> None:
    """Of a bare machine: neither our package nor what only services and grammars need."""
    program = """
import sys
sys.path[:] = [path for path in sys.path if not path.endswith("protos")]
for name in ("grpc", "structlog", "httpx", "google", "llguidance", "transformers"):
    sys.modules[name] = None
import bench.gpu.__main__
import bench.kernels
print("headway.reasons" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.stdout.split()[-1:] == [b"True"], done.stderr.decode()[-2000:]
