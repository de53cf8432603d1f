"""The house rules of ARCHITECTURE.md, enforced on the source itself."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from headway.errors import TABLE
from headway.reasons import Reason
from headway.settings import Settings

ROOT = Path(__file__).parent.parent
SERVICES = ("scheduler_svc", "executor_svc", "gateway_http")
CORE_MAY_IMPORT = frozenset(
    {"array", "collections", "dataclasses", "enum", "functools", "heapq"}
    | {"bisect", "itertools", "math", "typing"}
)
TORCH_ENGINE_MAY_IMPORT = frozenset(
    {"torch", "triton", "numpy", "safetensors", "tokenizers", "huggingface_hub", "flash_attn"}
    | {"llguidance"}
)
# The only files that may import a package (prefix of a dotted name -> path patterns).
ONE_DOOR = {
    "google.rpc": ("protos/headway/errors.py",),
    "sqlite3": ("scheduler_svc/store/*.py",),
    "asyncpg": ("scheduler_svc/store/*.py",),
    "flash_attn": ("executor_svc/torch_engine/attention/flash_attn_pkg.py",),
    "llguidance": tuple(f"executor_svc/torch_engine/grammar{part}.py" for part in ("", "_source")),
    # the second is a training script, which renders its own template only
    "jinja2": ("gateway_http/text.py", "executor_svc/builtin_model/tokenizer.py"),
}
FORBIDDEN_IMPORTS = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "protos")
FORBIDDEN_WORDS = ("torch.load", "torch.export.load", "trust_remote_code", "auto_map")


@cache
def sources() -> tuple[Path, ...]:
    folders = (*SERVICES, "protos/headway")
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return tuple(path for path in found if "_pb2" not in path.name)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything imported, at any depth of the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("service", SERVICES)
def test_core_is_pure(service: str) -> None:
    files = [path for path in sources() if relative(path).startswith(f"{service}/core/")]
    assert files
    for path in files:
        for name in imports(path):
            is_allowed = (
                name.split(".")[0] in CORE_MAY_IMPORT
                or is_under(name, f"{service}.core")
                or is_under(name, "headway.reasons")
            )
            # `from service import core` names the package itself first
            assert is_allowed or name in (service, "headway"), f"{relative(path)} imports {name}"


def test_services_do_not_know_each_other() -> None:
    for path in sources():
        home = relative(path).split("/")[0]
        for name in imports(path):
            root = name.split(".")[0]
            assert root not in SERVICES or root == home, f"{relative(path)} imports {name}"


def test_torch_engine_runs_on_a_bare_gpu_machine() -> None:
    import sys

    for path in sources():
        if not relative(path).startswith("executor_svc/torch_engine/"):
            continue
        for name in imports(path):
            root = name.split(".")[0]
            is_allowed = (
                root in sys.stdlib_module_names - {"asyncio"}
                or root in TORCH_ENGINE_MAY_IMPORT
                or is_under(name, "executor_svc.torch_engine")
                or is_under(name, "executor_svc.core")
                or is_under(name, "headway.reasons")
            )
            assert is_allowed, f"{relative(path)} imports {name}"


def test_one_door_for_each_dangerous_or_private_package() -> None:
    for path in sources():
        for name in imports(path):
            assert name.split(".")[0] not in FORBIDDEN_IMPORTS, f"{relative(path)} imports {name}"
            for package, patterns in ONE_DOOR.items():
                if is_under(name, package):
                    is_door = any(Path(relative(path)).match(pattern) for pattern in patterns)
                    assert is_door, f"{relative(path)}: {name}"


def test_no_source_names_an_unsafe_loader() -> None:
    for path in sources():
        code = "\n".join(
            ast.unparse(node)
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute | ast.keyword)
        )
        for word in FORBIDDEN_WORDS:
            assert word not in code, f"{relative(path)} uses {word}"


def test_environment_is_read_in_one_place() -> None:
    for path in sources():
        if relative(path) == "protos/headway/settings.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv"), f"{relative(path)}:{node.lineno}"


def test_no_circles() -> None:
    modules = {module_name(path): path for path in sources()}
    edges = {
        name: {found for found in map(nearest(modules), imports(path)) if found}
        for name, path in modules.items()
    }
    visiting: list[str] = []
    done: set[str] = set()

    def visit(name: str) -> None:
        assert name not in visiting, " -> ".join([*visiting[visiting.index(name) :], name])
        if name in done:
            return
        visiting.append(name)
        for target in sorted(edges[name] - {name}):
            visit(target)
        visiting.pop()
        done.add(name)

    for name in sorted(modules):
        visit(name)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "protos" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nearest(modules: dict[str, Path]):  # type: ignore[no-untyped-def]
    def find(name: str) -> str | None:
        """The module that an import really loads code from; packages are empty."""
        if name in modules and modules[name].name != "__init__.py":
            return name
        return None

    return find


def test_packages_are_empty_and_have_telling_names() -> None:
    for path in sources():
        assert path.parent.name not in ("common", "utils", "helpers"), relative(path)
        if path.name == "__init__.py":
            assert path.read_text() == "", f"{relative(path)} is not empty"


def test_every_module_opens_with_a_docstring() -> None:
    for path in sources():
        if path.name != "__init__.py":
            assert ast.get_docstring(tree(path)), f"{relative(path)} has no docstring"


def test_error_table_is_complete() -> None:
    assert set(TABLE) == set(Reason)
    assert all(reason.value == reason.name for reason in Reason)


def settings_classes() -> list[type[Settings]]:
    from executor_svc.settings import ExecutorSettings
    from gateway_http.settings import GatewaySettings
    from scheduler_svc.settings import SchedulerSettings

    return [SchedulerSettings, ExecutorSettings, GatewaySettings]


def test_every_setting_has_help() -> None:
    for cls in settings_classes():
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name} has no description"
            assert not field.is_required(), f"{cls.__name__}.{name} has no default"


# Numbers without a unit, by what they are; and a bare adjective where what is counted is plain.
WITHOUT_UNIT = frozenset(
    {"port", "default_band", "warm_bonus", "max_logit_bias", "openmp_spin_count"}
    | {"max_inflight", "max_inflight_per_tenant", "max_inflight_per_model"}
    | {"collect_max_live", "tinker_max_outstanding"}
    # shares, between 0 and 1, and weights
    | {"snapshot_time_share", "switch_time_share", "gpu_memory_utilization", "output_token_weight"}
    # as vLLM has them
    | {"max_model_len", "block_size", "tensor_parallel_size", "mock_vocab_size"}
)


def test_every_number_has_its_unit_in_its_name() -> None:
    """``_ms``, ``_s``, or the plural of what it counts: ``max_body_bytes``, ``num_bands``."""
    names = set()
    for cls in settings_classes():
        for name, field in cls.model_fields.items():
            if re.search(r"\b(int|float)\b", str(field.annotation)):
                names.add(name)
                has_unit = re.search(r"s(_per_[a-z]+)?$", name)
                assert has_unit or name in WITHOUT_UNIT, f"{cls.__name__}.{name}"
    assert names >= WITHOUT_UNIT, "each exception is needed"


@pytest.mark.parametrize("cls", settings_classes(), ids=lambda cls: cls.__name__)
def test_help_describes_every_setting(
    cls: type[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no word is cut in two
    with pytest.raises(SystemExit):
        cls.load("headway", ["--help"])
    _, *entries = re.split(r"\n  (?=--)", capsys.readouterr().out)
    said = {re.split(r"[\s,]", entry)[0]: " ".join(entry.split()) for entry in entries}
    for name, field in cls.model_fields.items():
        assert " ".join(str(field.description).split()) in said[f"--{name.replace('_', '-')}"]


def test_make_helps_with_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    described = set(re.findall(r"^([a-z][a-z-]*):.*## ", makefile, re.MULTILINE))
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony.split()) == described
