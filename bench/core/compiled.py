"""The same benchmark in a process of its own that imports the compiled core."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHOWN = ("decisions_per_s", "p50_us", "p99_us", "max_ms")


def _nobody(_: str) -> None:
    """Hears nothing."""


def python_with(folder: Path, *words: str, told: Callable[[str], None] = _nobody) -> list[str]:
    """Run this interpreter with a folder's packages before everybody else's; the output's lines.

    ``told`` hears each of them as it comes.

    Raises:
        subprocess.CalledProcessError: it failed; what it wrote to stderr was shown.
    """
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "protos")))
    lines = []
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            told(lines[-1])
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, "\n".join(lines))
    return lines


def _show(line: str) -> None:
    if not line.startswith("{"):  # the figures come in the last line of the parent
        print(line, flush=True)


def measure_compiled(folder: Path, is_quick: bool) -> dict[str, Any]:
    """What the last line says more when the compiled core of a folder was measured."""
    print("compiled:", flush=True)
    words = ("-m", "bench.core", *(["--quick"] if is_quick else []))
    *_, last = python_with(folder, *words, told=_show)
    found = json.loads(last)
    assert found["is_compiled"], "the source was imported instead of the compiled core"
    return {f"compiled_{name}": found[name] for name in SHOWN} | {"compiled": found}
