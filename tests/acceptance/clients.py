"""Other people's client programs, each in a process with its own Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.stack import ROOT, Stack

OWN_PYTHON = Path(sys.executable)
MINT_PYTHON = ROOT / ".venv-mint" / "bin" / "python"
needs_mint = pytest.mark.skipif(
    not MINT_PYTHON.exists(), reason="make .venv-mint/.ready sets it up"
)


def start_client(
    stack: Stack, python: Path, script: Path, *, api_key: str = "tml-test"
) -> subprocess.Popen[str]:
    """The SDKs find gateway, key and model in the environment; stderr goes to pytest."""
    env = {
        **os.environ,
        "TINKER_BASE_URL": stack.gateway_url,
        "TINKER_API_KEY": api_key,
        # MinT's package copies these over the two above
        "MINT_BASE_URL": stack.gateway_url,
        "MINT_API_KEY": api_key,
        "MINT_BASE_MODEL": "mock",
    }
    command = [str(python), str(script)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)
