"""The built-in model's training text: what the running Python says about itself.

Rule: every word comes from the standard library's own docstrings and `pydoc_data.topics`.

Modules written in Python are parsed, not imported: importing all of them would open browsers and
windows. Modules written in C have no source here, so a named few are imported and inspected. The
result depends on the Python version only, never on import order or on what else is installed.
"""

import ast
import importlib
import inspect
import pathlib
import re
import sysconfig
import types
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

# Other people's code, tests, and applications that ship beside the library.
_LEFT_OUT_PARTS = {
    "site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "distutils",
    "ensurepip", "turtledemo", "pydoc_data", "__pycache__", "__phello__",
}  # fmt: skip

# The pure twin of a C module documents the public one.
_PUBLIC_MODULES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "posixpath": "os.path",
}

# Documented in C (or partly so), and safe to import.
_INSPECTED_MODULES = (
    "builtins", "array", "asyncio", "atexit", "binascii", "bisect", "bz2", "cmath", "collections",
    "contextvars", "csv", "datetime", "decimal", "errno", "faulthandler", "functools", "gc",
    "hashlib", "heapq", "io", "itertools", "json", "lzma", "marshal", "math", "mmap", "operator",
    "os", "pickle", "queue", "random", "re", "select", "signal", "socket", "sqlite3", "ssl",
    "string", "struct", "sys", "threading", "time", "tracemalloc", "types", "unicodedata",
    "weakref", "zlib", "zoneinfo",
)  # fmt: skip

# One documented name in so many is never trained on, so that its loss can be measured.
_HELD_OUT_ONE_IN = 50


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing: a module, class, function, method or language topic."""

    name: str  # as a user writes it: "json.dumps", "str.split", "len"
    module: str  # "builtins" for len and str.split
    kind: str  # "module", "class", "function", "method", "topic"
    signature: str  # "(obj, *, indent=None)"; empty when unknown
    text: str

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))

    @property
    def is_held_out(self) -> bool:
        is_counted = self.kind in ("class", "function", "method") and self.module != "builtins"
        return is_counted and zlib.crc32(self.name.encode()) % _HELD_OUT_ONE_IN == 0

    def as_plain_text(self) -> str:
        """The entry as `help()` would lay it out: a heading line, then the text."""
        if self.kind == "topic":
            return self.text
        heading = f"module {self.name}" if self.kind == "module" else self.name + self.signature
        return f"{heading}\n\n{self.text}"


def collect() -> list[Entry]:
    """All entries, sorted by name. Two names of one thing are two entries with the same text."""
    found: dict[str, Entry] = {}
    for entry in (*_parsed(), *_inspected(), *_topics()):
        found.setdefault(entry.name, entry)
    return sorted(found.values(), key=lambda entry: entry.name)


def plain_texts(entries: list[Entry]) -> list[str]:
    """The entries as `help()` would lay them out, each docstring once."""
    by_text: dict[str, Entry] = {}
    for entry in entries:
        by_text.setdefault(entry.text, entry)
    return [entry.as_plain_text() for entry in by_text.values()]


def vocabulary(entries: list[Entry]) -> set[str]:
    """Every lower-case word of the entries' plain text."""
    return {word for entry in entries for word in words(entry.as_plain_text())}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _topics() -> Iterator[Entry]:
    for name in sorted(topics):
        yield Entry(f"topic {name}", "", "topic", "", topics[name].strip())


def _parsed() -> Iterator[Entry]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT_PARTS & set(parts) or parts[0].startswith("config-"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old strings are not our concern
            tree = ast.parse(path.read_bytes())
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield from _parsed_node(tree, "", _PUBLIC_MODULES.get(dotted, dotted), in_class=False)


def _parsed_node(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    path: str,
    module: str,
    *,
    in_class: bool,
) -> Iterator[Entry]:
    text = ast.get_docstring(node)
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if text:
        signature = ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = _without_self(f"({ast.unparse(node.args)})")
            kind = "method" if in_class else "function"
        else:
            kind = "class" if path else "module"
        yield Entry(f"{module}.{path}" if path else module, module, kind, signature, text)
    if is_function:
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{path}.{child.name}" if path else child.name
            yield from _parsed_node(child, name, module, in_class=bool(path))


def _inspected() -> Iterator[Entry]:
    for module_name in _INSPECTED_MODULES:
        module = importlib.import_module(module_name)
        yield from _inspected_value(module, module_name, module_name, "module")
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name, value in sorted(vars(module).items()):
            if isinstance(value, types.ModuleType) or not callable(value):
                continue
            owner = str(getattr(value, "__module__", "") or module_name)
            if module_name != "builtins" and owner == "builtins" and isinstance(value, type):
                continue  # os.error is OSError, which builtins have already
            kind = "class" if isinstance(value, type) else "function"
            yield from _inspected_value(value, prefix + name, module_name, kind)
            if isinstance(value, type):
                for attribute, member in sorted(vars(value).items()):
                    if callable(member) and not isinstance(member, type):
                        yield from _inspected_value(
                            member, f"{prefix}{name}.{attribute}", module_name, "method"
                        )


def _inspected_value(value: object, name: str, module: str, kind: str) -> Iterator[Entry]:
    text = value.__dict__.get("__doc__") if isinstance(value, type) else value.__doc__
    if not isinstance(text, str) or not text.strip():
        return
    try:
        signature = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        signature = ""
    if " at 0x" in signature:
        signature = ""  # an address differs from run to run
    yield Entry(name, module, kind, _without_self(signature), inspect.cleandoc(text))


def _without_self(signature: str) -> str:
    return re.sub(r"^\((?:self|cls)(?:, /)?(?:, )?", "(", signature)
