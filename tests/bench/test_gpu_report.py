"""``make gpu`` on tiny shapes, without a GPU: every part says what it promises, or why not."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.bench.targets import error_of, figures_of


def test_the_gpu_report_has_every_part() -> None:
    pytest.importorskip("triton")
    figures = figures_of("gpu", "--device=cpu", "--quick")
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
    assert "Error" in error_of("gpu", "--device=cpu", "--quick", *options)


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
