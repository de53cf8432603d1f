"""MinT's published queue_status.py, unchanged, and the same calls with tinker 0.38."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.stack import ROOT, Stack
from tests.acceptance.clients import MINT_PYTHON, OWN_PYTHON, needs_mint, start_client

MINT_SCRIPT = ROOT.parent / "shared" / "acceptance" / "queue_status.py"
OWN_SCRIPT = Path(__file__).parent / "queue_status_038.py"
NUM_AHEAD = 4
ENDLESS = 30_000  # tokens: minutes of work
TIMEOUT_S = 90


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One seat, and clients that are told to ask once a second."""
    executor = {"max_num_seqs": 1, "mock_step_ms": 5}
    with Stack.start(executor=executor, gateway={"retry_after_max_s": 1}) as stack:
        yield stack


def submit(http: httpx.Client, num_tokens: int) -> str:
    body = {
        "base_model": "mock",
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1] * 16}]},
        "sampling_params": {"max_tokens": num_tokens},
    }
    request_id: str = http.post("asample", json=body).raise_for_status().json()["request_id"]
    return request_id


def watch(stack: Stack, python: Path, script: Path) -> list[str]:
    """Its output, with the seat taken and a queue before it, of which one leaves with each poll."""
    with httpx.Client(base_url=f"{stack.gateway_url}/api/v1/", timeout=60) as http:
        ahead = [submit(http, ENDLESS) for _ in range(1 + NUM_AHEAD)]
        with start_client(stack, python, script) as process:
            timer = threading.Timer(TIMEOUT_S, process.kill)
            timer.start()
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "queue_position" in line and ahead:
                    leaving = {"request_id": ahead.pop(0)}
                    http.post("cancel_future", json=leaving).raise_for_status()
            timer.cancel()
    assert process.returncode == 0, lines
    return lines


def check_positions(positions: list[int]) -> None:
    """All before it at first, and from there only forward, through every place."""
    assert positions == sorted(positions, reverse=True)
    places = sorted({*positions, 0}, reverse=True)
    assert places == list(range(NUM_AHEAD, -1, -1))


def fields(line: str) -> dict[str, str]:
    """Of a queue_fields line: name='text', name=1.5 or name=None."""
    return dict(re.findall(r"(\w+)=('[^']*'|\{[^}]*\}|\S+)", line))


@needs_mint
@pytest.mark.skipif(not MINT_SCRIPT.exists(), reason="MinT's script is not part of the project")
def test_mints_own_script_sees_the_queue_move(stack: Stack) -> None:
    lines = watch(stack, MINT_PYTHON, MINT_SCRIPT)
    assert lines[0].startswith("sampling_session_created")
    assert lines[1].startswith("request_submitted")
    assert lines[-1].startswith("result_received")
    assert "keys=['sequences', 'request_id'" in lines[-1]
    polls = [fields(line) for line in lines[2:-1]]
    check_positions([int(poll["queue_position"]) for poll in polls])
    assert {poll["type"] for poll in polls} == {"'pending'"}
    assert {poll["queue_state"] for poll in polls} <= {"'waiting'", "'processing'"}
    assert polls[0]["queue_state"] == "'waiting'"
    for name in ("queue_position", "queue_depth"):
        assert [poll[name] for poll in polls] == [poll[f"x_{name}"] for poll in polls]


def test_the_same_calls_with_tinker_0_38(stack: Stack) -> None:
    *polls, result = (json.loads(line) for line in watch(stack, OWN_PYTHON, OWN_SCRIPT))
    assert result["event"] == "finished"
    assert len(result["sequences"][0]["tokens"]) == 128
    assert {poll["request_id"] for poll in polls} == {result["request_id"]}
    check_positions([poll["queue_position"] for poll in polls])
