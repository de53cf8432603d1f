"""The same benchmark in a process of its own that imports the compiled core."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHOWN = ("decisions_per_s", "p50_us", "p99_us", "max_ms")


def python_with(folder: Path, *words: str) -> list[str]:
    """Run this interpreter with a folder's packages before everybody else's; the output's lines.

    Raises:
        subprocess.CalledProcessError: it failed; what it wrote to stderr was shown.
    """
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "protos")))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def measure_compiled(folder: Path, is_quick: bool) -> dict[str, Any]:
    """What the last line says more when the compiled core of a folder was measured."""
    print("compiled:", flush=True)
    *lines, last = python_with(folder, "-m", "bench.core", *(["--quick"] if is_quick else []))
    print("\n".join(lines), flush=True)
    found = json.loads(last)
    assert found["is_compiled"], "the source was imported instead of the compiled core"
    return {f"compiled_{name}": found[name] for name in SHOWN} | {"compiled": found}
