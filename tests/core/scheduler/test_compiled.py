"""The compiled core decides as the interpreted one, and nothing compiled lies beside its source.

Compiles without optimisation, the same C otherwise: 20 s of CPU the first time, then nothing until
a file of the core changes (build/compiled-core).
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

import hatch_build
from bench.core.compiled import ROOT, python_with

# Crashes, stalls, slow and broken wires, clients that hang up, more load than the fleet can take.
RUN = """
import importlib.util
import json
from bench.sim.compare import Plan, run_plan
from scheduler_svc.core import messages, scheduler

plan = Plan("headway", load=1.1, seed=3, seconds=300, num_faults=6, impatient_share=0.1)
figures = run_plan(plan)
print(json.dumps([scheduler.__file__, messages.__file__, figures["log_hash"]]))
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    missing = hatch_build.missing_tool()
    if missing is not None:
        pytest.skip(f"needs {missing}")
    return hatch_build.compiled_core(opt_level=0)


def test_the_compiled_core_decides_the_same(folder: Path) -> None:
    *files, compiled_hash = json.loads(python_with(folder, "-c", RUN)[-1])
    assert all(Path(file).is_relative_to(folder) and file.endswith(".so") for file in files)
    *files, interpreted_hash = json.loads(python_with(ROOT, "-c", RUN)[-1])
    assert all(Path(file).is_relative_to(ROOT / "scheduler_svc") for file in files)
    assert compiled_hash == interpreted_hash


def test_the_compiled_core_passes_the_tests_of_its_source(folder: Path) -> None:
    """Not those of whole services, which have no other rules, and not this file."""
    here = Path(__file__).parent
    others = {here / f"test_{name}.py" for name in ("compiled", "scenarios_http")}
    files = set(here.glob("test_*.py")) - others
    files.add(ROOT / "tests" / "machine" / "test_scheduler_machine.py")
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT))
    words = ("-m", "pytest", *settings, "-p", "no:cacheprovider", *map(str, sorted(files)))
    said = python_with(folder, *words, told=print)
    assert re.search(r"\b[1-9]\d{2} passed", said[-1])


def test_the_compiled_benchmark_has_the_same_figures(folder: Path) -> None:
    rows = []
    for path in (folder, ROOT):
        figures = json.loads(python_with(path, "-m", "bench.core", "--quick")[-1])
        assert figures["is_compiled"] == (path == folder)
        counted = ("num_queued_at_end", "grants_per_end", "loads_per_1000")
        rows.append([[row[name] for name in counted] for row in figures["headway"]])
    assert rows[0] == rows[1]


SOURCE = """
from dataclasses import dataclass, field
@dataclass(frozen=True, slots=True)
class A:
    x: int
    y: tuple[int, ...] = (1,)
    # a comment
    z: dict[str, int] = field(default_factory=dict)
    def twice(self) -> int:
        return 2 * self.x
@dataclass(slots=True)
class B:
    x: int
    def __init__(self) -> None:
        self.x = 5
class C:
    x: int = 3
"""


def test_a_written_constructor_is_the_one_that_dataclass_makes() -> None:
    written = hatch_build.with_constructors(SOURCE.replace("frozen=True", "unsafe_hash=True"))
    assert written.count("def __init__") == 2
    made: dict[str, Any] = {"__name__": "made"}
    exec(written, made)
    first = made["A"](4)
    assert (first.x, first.y, first.z, first.twice()) == (4, (1,), {}, 8)
    assert first.z is not made["A"](4).z
    assert made["A"](1, y=(), z={"a": 2}) == made["A"](1, (), {"a": 2})
    assert made["B"]().x == 5
    with pytest.raises(TypeError):
        made["A"]()


def test_no_compiled_module_hides_its_source() -> None:
    assert not list((ROOT / "scheduler_svc").rglob("*.so"))


@pytest.mark.parametrize(("name", "said"), [("mypyc", "mypyc"), ("no-such-cc", "a C compiler")])
def test_a_missing_tool_is_named_in_one_line(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "mypyc":
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    else:
        monkeypatch.setenv("CC", f"{name} -pthread")
    with pytest.raises(SystemExit, match=said) as stopped:
        hatch_build.compiled_core()
    assert len(str(stopped.value).splitlines()) == 1


def test_only_a_wheel_that_asks_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compiled_core() -> Path:
        compiled.append(True)
        return ROOT / "docs"

    monkeypatch.setattr(hatch_build, "generate", lambda: None)
    monkeypatch.setattr(hatch_build, "compiled_core", compiled_core)
    nothing: Any = None
    for target, version, asked in (
        ("wheel", "standard", "0"),
        ("wheel", "editable", "1"),
        ("sdist", "standard", "1"),
        ("wheel", "standard", "1"),
    ):
        monkeypatch.setenv("HEADWAY_COMPILE", asked)
        hook = hatch_build.BuildHook(str(ROOT), {}, nothing, nothing, "", target)
        build_data = {"force_include": {}, "pure_python": True, "infer_tag": False}
        hook.initialize(version, build_data)
        is_last = (target, version, asked) == ("wheel", "standard", "1")
        assert bool(compiled) is is_last
        assert build_data["pure_python"] is not is_last
