"""What ``make`` would run, made small."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bench.stack import ROOT

# Whether they are set up is for whoever runs the tests.
_ENVIRONMENTS = [f"--assume-old={name}/.ready" for name in (".venv", ".venv-mint", ".venv-peers")]


def described() -> dict[str, str]:
    """Every target that ``make help`` lists, with its line."""
    makefile = (ROOT / "Makefile").read_text()
    return dict(re.findall(r"^([a-z][a-z-]*):.*## (.*)$", makefile, re.MULTILINE))


def recipe(target: str, variables: Mapping[str, object] | None = None) -> str:
    """The shell commands of a target, by this environment's Python, also where make runs us."""
    words = [f"{name}={value}" for name, value in (variables or {}).items()]
    done = subprocess.run(
        [
            "make",
            "--dry-run",
            "--no-print-directory",
            *_ENVIRONMENTS,
            f"BIN={Path(sys.executable).parent}",
            *words,
            target,
        ],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def output_of(target: str, *options: str, variables: Mapping[str, object] | None = None) -> str:
    """What the target's command says with some more options, which win over those before them."""
    done = _run(target, options, variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def error_of(target: str, *options: str) -> str:
    """What it says when it fails, which it must."""
    done = _run(target, options, None)
    assert done.returncode != 0, done.stdout
    return done.stderr


def figures_of(
    target: str, *options: str, variables: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """The last line of what it says: one JSON object with its name, in which every number is
    finite. Before it stands how far it was."""
    *progress, last = output_of(target, *options, variables=variables).splitlines()
    figures = json.loads(last, parse_constant=_refuse)
    assert isinstance(figures, dict)
    assert figures["bench"] == target.removeprefix("bench-")
    assert progress
    return figures


def _run(
    target: str, options: Sequence[str], variables: Mapping[str, object] | None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'{recipe(target, variables)} "$@"', target, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"a figure is {constant}")
