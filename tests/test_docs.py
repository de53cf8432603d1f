"""What the documents name is there: files, commands, settings with their defaults, tests."""

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from executor_svc.settings import ExecutorSettings
from gateway_http.settings import GatewaySettings
from headway.settings import Settings
from scheduler_svc.settings import SchedulerSettings

ROOT = Path(__file__).parent.parent
FOLDERS = ("bench", "docs", "executor_svc", "gateway_http", "protos", "scheduler_svc", "tests")
DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "executor_svc/builtin_model/README.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SETTINGS: tuple[type[Settings], ...] = (SchedulerSettings, ExecutorSettings, GatewaySettings)
# Names in backticks that look like ours and are not: a model, what is made, other people's words.
NOT_FILES = {"headway/tiny-pydoc", "runs/sim.html", "build/", "../shared/traces"}
FOREIGN = {"wait_for_connection", "tcp_wmem", "__delitem__"}
SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "million": 1e6, "%": 0.01}

_SCENARIO = re.compile(r"test_scenario_(\d\d)_")

pytestmark = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)


@cache
def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def quoted(document: Path) -> Iterator[str]:
    """Everything in backticks, without the longer examples."""
    yield from re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text_of(document), flags=re.S))


@cache
def files() -> tuple[str, ...]:
    """Every file and folder, each from a slash on, folders with one at their end as well."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [ROOT / folder, *(ROOT / folder).rglob("*")]
    names = [(f"/{path.relative_to(ROOT).as_posix()}", path.is_dir()) for path in found]
    return tuple(f"{name}/" if is_folder else name for name, is_folder in names)


@cache
def sources() -> dict[str, str]:
    """The text of all code, by name."""
    names = [name for name in files() if name.endswith((".py", ".proto", ".toml", "file", ".js"))]
    return {name: (ROOT / name[1:]).read_text(encoding="utf-8") for name in names}


@cache
def words() -> frozenset[str]:
    """In small letters: codes of errors are reasons, and environment variables settings."""
    found = (re.findall(r"\w+", text.lower()) for text in sources().values())
    return frozenset(word for one in found for word in one)


@cache
def names_of_tests() -> frozenset[str]:
    found = [
        name
        for path, text in sources().items()
        if path.startswith("/tests/")
        for name in re.findall(r"^ *(?:async )?def (test_\w+)", text, re.MULTILINE)
    ]
    return frozenset(found)


def unfolded(pattern: str) -> list[str]:
    """With each of the names in braces, as a shell has it."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    names, _, after = rest.partition("}")
    return [whole for name in names.split(",") for whole in unfolded(before + name + after)]


def is_there(pattern: str) -> bool:
    """``core/drain.py`` is a file of any service; ``/`` at the end is a folder."""
    return any(fnmatch(name, f"*/{pattern}") for name in files())


@cache
def environment() -> frozenset[str]:
    """The variables that settings are read from."""
    return frozenset(
        f"{settings.model_config['env_prefix']}{name}".upper()
        for settings in SETTINGS
        for name in (*settings.model_fields, "config")
    )


def test_files_exist(document: Path) -> None:
    for name in set(quoted(document)) - NOT_FILES:
        looks_so = re.fullmatch(r"[\w.*{},/-]+", name) and not name.startswith("/")
        if looks_so and ("/" in name or re.search(r"\.(py|md|toml|txt|proto|html)$", name)):
            for pattern in unfolded(name.removeprefix(".../")):
                assert is_there(pattern) or is_there(f"{pattern}/"), name


def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(document)):
        if "://" not in target:
            assert (document.parent / target.partition("#")[0]).exists(), target


def test_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) *\?=", makefile, re.MULTILINE)) | {"CASES"}
    commands = re.findall(r"(?:^|`)((?:[A-Z_]+=\S+ )*make [^`\n#]*)", text_of(document), re.M)
    for command in commands:
        names = [word for word in command.split() if re.fullmatch(r"[a-z][a-z-]*", word)]
        assert set(names[1:2]) <= targets, command
        before, _, after = command.partition("make ")
        assert set(re.findall(r"\b([A-Z_]+)=", before)) <= environment(), command
        assert set(re.findall(r"\b([A-Z_]+)=", after)) <= variables, command


def test_modules_and_their_options_exist(document: Path) -> None:
    for module, rest in re.findall(r"python -m ([\w.]+)([^`\n|]*)", text_of(document)):
        path = f"/{module.replace('.', '/')}"
        own = "".join(
            text for name, text in sources().items() if name.startswith((f"{path}.py", f"{path}/"))
        )
        assert own, f"python -m {module}"
        for option in re.findall(r"--([a-z][a-z-]*)", rest):
            assert option == "help" or f'"--{option}"' in own, f"{module} --{option}"


def test_names_are_those_of_the_code(document: Path) -> None:
    variables = environment()
    scenarios = {re.sub(r"^test_scenario_\d+_", "", name) for name in names_of_tests()}
    for name in set(quoted(document)) - FOREIGN:
        if re.match(r"(SCHEDULER|EXECUTOR|GATEWAY)_[A-Z]", name):
            assert re.split(r"[=*]", name)[0] in {*variables, "SCHEDULER_PORT", "GATEWAY_PORT"}, (
                name
            )
        elif re.fullmatch(r"test_[\w*]+", name):
            assert any(fnmatch(test, name) for test in names_of_tests()), name
        elif re.fullmatch(r"[a-zA-Z]\w*_\w*", name):
            assert name.lower() in words() or name in scenarios, name


def cells_of_tests(document: Path) -> Iterator[str]:
    """The cells of each column that says where something is tested."""
    column = None
    for line in text_of(document).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        headings = [at for at, cell in enumerate(cells) if cell in ("test", "checked in")]
        if headings or not cells:
            column = headings[0] if headings else None
        elif column is not None and not cells[0].startswith("---"):
            yield cells[column]


def is_test(name: str) -> bool:
    """A test, a scenario without its number, a file or folder of checks, or one inside a file."""
    suffix = re.compile(rf"test_scenario_\d+_{re.escape(name)}")
    return (
        any(fnmatch(test, name) or suffix.fullmatch(test) for test in names_of_tests())
        or is_there(name)
        or is_there(f"{name}/")
        or any(
            f"def {name}(" in text
            for path, text in sources().items()
            if path.startswith(("/tests/", "/bench/"))
        )
    )


def test_tables_name_tests_that_exist(document: Path) -> None:
    """A row names tests, scenarios, benchmarks, or who looks in invariants.py."""
    numbers = {found[1] for found in map(_SCENARIO.match, names_of_tests()) if found}
    invariants = sources()["/scheduler_svc/core/invariants.py"]
    for cell in cells_of_tests(document):
        names = re.findall(r"`([^`]+)`", cell)
        said = re.findall(r"\b\d+\b", re.sub(r"`[^`]+`", "", cell))
        assert names or said, cell
        assert {f"{int(number):02}" for number in said} <= numbers, cell
        for name in names:
            assert is_test(name), name
        for parts in re.findall(r"`invariants.py` \(([\w, ]+)\)", cell):
            for part in parts.split(", "):
                assert f"def _check_{part.replace(' ', '_')}(" in invariants, part


def values_of(text: str) -> set[float]:
    """The numbers that a cell names, in the base units of settings."""
    found = set()
    for number, unit in re.findall(r"(\d[\d,.]*)\s*(\w+|%)?", text):
        plain = float(number.rstrip(".,").replace(",", ""))
        found |= {plain, plain * SIZES.get(unit.removesuffix("/s"), 1), plain * 1_000}
    return found


def test_defaults_are_as_they_are_said(document: Path) -> None:
    """In rows ``| what | `setting` | value |``, and as ``setting` (value)`` in a sentence."""
    said = re.findall(r"`([a-z_]+)` (?:\(|= |is )(\d[^);|\n]*)", text_of(document))
    for setting, value in re.findall(
        r"^\|[^|]*\| ((?:`[a-z_]+`(?:, )?)+) \| ([^|]*) \|", text_of(document), re.M
    ):
        said += [(name, value) for name in re.findall(r"`([a-z_]+)`", setting)]
    for name, value in said:
        defaults = [
            settings.model_fields[name].default
            for settings in SETTINGS
            if name in settings.model_fields
        ]
        if defaults and re.search(r"\d", value):
            assert values_of(value) & set(defaults), f"{name} is {defaults}, not {value}"
