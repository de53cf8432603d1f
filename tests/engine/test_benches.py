"""The benchmarks of the engine run, on tiny shapes, and say what they promise."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest


def last_line(module: str, *options: str) -> Any:
    """What a benchmark's last line says, once it ended well."""
    done = subprocess.run(
        [sys.executable, "-m", module, *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_engine_stands_beside_transformers() -> None:
    figures = last_line("bench.engine", "--quick", "--batches", "1", "2", "--tokens", "3")
    for batch in ("1", "2"):
        assert figures[batch]["headway_tok_s"] > 0
        assert figures[batch]["transformers_tok_s"] > 0
    assert figures["headway_first_token_ms"] > 0


def test_the_gpu_report_has_every_part() -> None:
    pytest.importorskip("triton")
    figures = last_line("bench.gpu", "--device", "cpu", "--quick")
    report, prices = figures["parts"], figures["price_of_exactness"]
    assert list(report) == [
        *("ceilings", "attention", "rows", "decode:tiny", "prefill:tiny", "decode-drawn:tiny"),
        *("decode-loose:tiny", "prefill-loose:tiny", "switch", "engine"),
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
    assert report["engine"]["tokens_per_s"] > 0
    assert report["engine"]["tokens_per_s_one_by_one"] > 0


@pytest.mark.parametrize(
    "options", [("--part", "decode:none"), ("--part", "nothing"), ("--device", "nowhere")]
)
def test_a_part_that_fails_says_so(options: Sequence[str]) -> None:
    with pytest.raises(AssertionError, match=r"Error|error"):
        last_line("bench.gpu", "--device", "cpu", "--quick", *options)


def test_a_part_that_hangs_is_ended_and_reported() -> None:
    from bench.gpu.__main__ import in_process

    assert in_process("ceilings", 0, ["--device", "cpu", "--quick"], {}) == {
        "failed": "ran longer than 0 s"
    }


def test_the_gpu_report_needs_none_of_the_services() -> None:
    program = (
        "import sys; import bench.gpu.__main__; import bench.kernels; "
        "print([name for name in ('grpc', 'structlog', 'httpx', 'transformers', 'headway.settings')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
