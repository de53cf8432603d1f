"""Waiting by the tinker SDK costs one held poll a sample, and the queue only moves on."""

import json
import subprocess
import sys

from bench.stack import ROOT

NUM_SAMPLES = 24
TIMEOUT_S = 120


def test_a_sample_is_waited_for_by_one_poll_and_its_place_never_falls_back() -> None:
    wish = ["--samples", str(NUM_SAMPLES), "--slots", "4", "--tokens", "20", "--once"]
    command = [sys.executable, "-m", "bench.polls", *wish]
    output = subprocess.check_output(command, cwd=ROOT, text=True, timeout=TIMEOUT_S)
    figures = json.loads(output.splitlines()[-1])
    assert figures["delivered"] == NUM_SAMPLES
    # a second poll is only for those that waited longer than the gateway holds one
    assert NUM_SAMPLES <= figures["sdk_polls"] <= 2 * NUM_SAMPLES
    assert figures["plain_polls"] > 1
    assert figures["plain_positions_rose"] == 0
