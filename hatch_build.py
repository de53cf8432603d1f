"""Build hook: turn protos/ into Python before anything is packed; compile the core if asked to.

``generate`` writes beside the .proto files, for every kind of install. ``compiled_core`` is for
wheels that are built with HEADWAY_COMPILE=1, the benchmark and a test (docs/adr/0011): it works on
a copy in build/, so that no compiled module ever lies beside its source and hides it.
"""

import ast
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
SOURCE = ROOT / "protos"

CORE = Path("scheduler_svc/core")
# Works on classes while they are made, which compiled code cannot.
INTERPRETED = ("__init__.py", "message.py")
COMPILER_TOOLS = ["mypy==2.4.1", "setuptools>=75"]
MYPY_SETTINGS = """\
[mypy]
strict = true
python_version = 3.11
explicit_package_bases = true
mypy_path = .,{source}
"""


def _plugin(name: str) -> str:
    """An isolated build has its tools on PATH, a developer's venv beside its interpreter."""
    return shutil.which(name) or str(Path(sys.executable).parent / name)


def generate() -> None:
    """Delete old output, then run protoc; the proto path is the Python path."""
    from grpc_tools import protoc

    for old in SOURCE.rglob("*_pb2*"):
        old.unlink()
    include = Path(protoc.__file__).parent / "_proto"
    protos = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"-I{SOURCE}",
            f"-I{include}",
            f"--plugin=protoc-gen-mypy={_plugin('protoc-gen-mypy')}",
            f"--plugin=protoc-gen-mypy_grpc={_plugin('protoc-gen-mypy_grpc')}",
            f"--python_out={SOURCE}",
            f"--grpc_python_out={SOURCE}",
            f"--mypy_out={SOURCE}",
            f"--mypy_grpc_out=only_async:{SOURCE}",
            *protos,
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")


def missing_tool() -> str | None:
    """What compiling lacks on this machine, None if nothing."""
    for module in ("mypyc", "setuptools"):
        if util.find_spec(module) is None:
            return f"the Python package that has {module} ({' '.join(COMPILER_TOOLS)})"
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    name = next(iter(shlex.split(compiler)), "cc")
    return None if shutil.which(name) else f"a C compiler ({name} is not found; CC names another)"


def compiled_core(opt_level: int = 3) -> Path:
    """A folder with the package scheduler_svc, its core compiled: put first on the path, it is
    imported instead of the source. Made once for the same sources, tools and level.

    Raises:
        SystemExit: a tool is missing, or does not accept the sources.
    """
    missing = missing_tool()
    if missing is not None:
        raise SystemExit(f"The core cannot be compiled: this needs {missing}.")
    sources = sorted(path for path in (ROOT / CORE).glob("*.py") if path.name not in INTERPRETED)
    folder = ROOT / "build" / "compiled-core" / _name_of(sources, opt_level)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            _compile(Path(work), [str(CORE / path.name) for path in sources], opt_level)
            # at once, so that a build that was broken off is not taken for a whole one
            (Path(work) / "out").rename(folder)
    # the rest of the package is cheap to copy and no part of the name
    ignored = shutil.ignore_patterns("__pycache__")
    package = folder / CORE.parts[0]
    shutil.copytree(ROOT / CORE.parts[0], package, ignore=ignored, dirs_exist_ok=True)
    return folder


def _name_of(sources: list[Path], opt_level: int) -> str:
    about = [metadata.version("mypy"), sys.version, sysconfig.get_platform(), str(opt_level)]
    digest = hashlib.sha256("\n".join(about).encode())
    for path in (Path(__file__), SOURCE / "headway" / "reasons.py", *sources):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(work: Path, modules: list[str], opt_level: int) -> None:
    """Leave the compiled modules, and nothing else, in ``work/out``."""
    shutil.copytree(ROOT / CORE, work / CORE, ignore=shutil.ignore_patterns("__pycache__"))
    (work / CORE.parts[0] / "__init__.py").touch()
    for name in modules:
        path = work / name
        source = with_constructors(path.read_text(encoding="utf-8"))
        path.write_text(without_collector(source), encoding="utf-8")
    (work / "mypy.ini").write_text(MYPY_SETTINGS.format(source=SOURCE), encoding="utf-8")
    done = subprocess.run(  # noqa: S603 - this interpreter, on files of this repository
        [sys.executable, "-m", "mypyc", "--config-file", "mypy.ini", *modules],
        cwd=work,
        env=os.environ | {"MYPYC_OPT_LEVEL": str(opt_level), "MYPYC_DEBUG_LEVEL": "0"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nThe core cannot be compiled: mypyc failed, see above.")
    for path in _extensions(work):
        if path.parts[0] != "build":
            target = work / "out" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            (work / path).rename(target)


def with_constructors(source: str) -> str:
    """A module in which dataclasses have the ``__init__`` that they would be given.

    One that is written there is compiled; one that ``dataclass`` makes is interpreted, and takes
    ten times as long.
    """
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    for node in reversed(classes):
        if any(map(_makes_dataclass, node.decorator_list)):
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            if fields and "__init__" not in methods:
                lines[fields[-1].end_lineno : fields[-1].end_lineno] = _constructor(fields)
    return "\n".join(lines) + "\n"


def without_collector(source: str) -> str:
    """A module whose dataclasses the garbage collector does not know, which must be in no cycle.

    It would look at each of a million requests, and at all that they refer to, while they are
    young. tests/core/scheduler/test_cycles.py has it that none of them is ever left to it.
    """
    lines = source.splitlines()
    body = ast.parse(source).body
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    found = [node for node in classes if any(map(_makes_dataclass, node.decorator_list))]
    if not found:
        return source
    for node in reversed(found):
        lines.insert(node.decorator_list[0].lineno - 1, "@mypyc_attr(acyclic=True)")
    last = max(
        node.end_lineno or 0 for node in body if isinstance(node, ast.Import | ast.ImportFrom)
    )
    # for the compiler alone: nothing of this is there when the module runs
    lines[last:last] = ["MYPY = False", "if MYPY:", "    from mypy_extensions import mypyc_attr"]
    return "\n".join(lines) + "\n"


def _makes_dataclass(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in (
        "dataclass",
        "message",
    )


def _constructor(fields: list[ast.AnnAssign]) -> list[str]:
    """Lines of an ``__init__`` for these fields; what a default factory makes may be left out."""
    parameters, moves = [], []
    for field in fields:
        name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
        value = name
        if isinstance(field.value, ast.Call) and ast.unparse(field.value.func) == "field":
            [factory] = [each.value for each in field.value.keywords]
            parameters.append(f"{name}: {kind} | None = None")
            value = f"{name} if {name} is not None else {ast.unparse(factory)}()"
        elif field.value is not None:
            parameters.append(f"{name}: {kind} = {ast.unparse(field.value)}")
        else:
            parameters.append(f"{name}: {kind}")
        # frozen ones are frozen to the type checker
        moves.append(f"        self.{name} = {value}  # type: ignore[misc,unused-ignore]")
    return ["", f"    def __init__(self, {', '.join(parameters)}) -> None:", *moves]


def _extensions(folder: Path) -> list[Path]:
    """Compiled modules, relative to the folder."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return sorted(path.relative_to(folder) for path in folder.rglob(f"*{suffix}"))


class BuildHook(BuildHookInterface[Any]):
    """Runs ``generate`` for wheels, sdists and editable installs alike."""

    def _is_compiled(self, version: str) -> bool:
        # an editable install never is: its compiled modules would outlive changes of the source
        return (
            self.target_name == "wheel"
            and version == "standard"
            and os.environ.get("HEADWAY_COMPILE") == "1"
        )

    def dependencies(self) -> list[str]:
        """Needed to build besides what pyproject.toml says."""
        return COMPILER_TOOLS if self._is_compiled("standard") else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before each build; ``version`` is "standard" or "editable"."""
        generate()
        if self._is_compiled(version):
            folder = compiled_core()
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            for path in _extensions(folder):
                build_data["force_include"][str(folder / path)] = str(path)


if __name__ == "__main__":
    generate()
