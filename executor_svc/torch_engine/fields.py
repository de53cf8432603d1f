"""The fields of a JSON file of a model, read one by one and checked."""

import math
from pathlib import Path
from typing import Any

from executor_svc.torch_engine.files import ModelError, read_json_object


class Fields:
    """A JSON object read with checks; ``null`` counts as missing."""

    def __init__(self, path: Path, prefix: str = "", values: dict[str, Any] | None = None) -> None:
        self._path, self._prefix = path, prefix
        self.values = read_json_object(path) if values is None else values

    def error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self._path}: {self._prefix}{name}: {problem}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def section(self, name: str) -> "Fields":
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Fields(self._path, f"{self._prefix}{name}.", value)

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error(name, "is missing or not a text")
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, f"{value!r} is not true or false")
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing")
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(name, f"{value!r} is not a positive whole number")
        return value

    def count(self, name: str, default: int) -> int:
        value = self.get(name, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self.error(name, f"{value!r} is not a whole number of 0 or more")
        return value

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing")
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise self.error(name, f"{value!r} is not a positive number")
        return float(value)
