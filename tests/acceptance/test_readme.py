"""What the README shows by hand works as it stands there, but for the ports."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bench.stack import ROOT, Stack

URL = re.compile(r"(?:http://)?(?:localhost|127\.0\.0\.1):8080")
EXAMPLES = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
PROGRAMS = [text for language, text in EXAMPLES if language == "python"]
REQUESTS = [text for _, text in EXAMPLES if text.startswith("curl ")]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack.start(engine="torch") as stack:
        yield stack


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs(stack: Stack, number: int) -> None:
    program, num_urls = URL.subn(stack.gateway_url, PROGRAMS[number])
    assert num_urls == 1
    assert re.search(r"\w", output_of([sys.executable, "-c", program]))


def test_requests(stack: Stack) -> None:
    assert len(REQUESTS) == 1
    command, num_urls = URL.subn(stack.gateway_url, REQUESTS[0])
    assert num_urls == 1
    said = output_of(["bash", "-c", command])
    assert '"delta":{"content":' in said
    assert said.rstrip().endswith("data: [DONE]")
