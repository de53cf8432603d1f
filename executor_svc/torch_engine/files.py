"""The files of a model folder.

Rule: no path leaves the model's root, whatever an index file or a symbolic link says.
"""

import json
from pathlib import Path
from typing import Any


class ModelError(Exception):
    """A model that cannot be served; the message says which file and what is wrong with it."""


def find_model_file(folder: Path, name: str) -> Path | None:
    """The path of a file, or None if there is no such file; ModelError if it lies elsewhere."""
    path = folder / name
    if not path.exists():
        return None
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        # The hub's cache keeps snapshots/<commit>/<file> as links to blobs/<digest>.
        roots.append(roots[0].parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise ModelError(f"{path}: leads out of the model folder")
    if not path.is_file():
        raise ModelError(f"{path}: not a file")
    return path


def model_file(folder: Path, name: str) -> Path:
    """Like ``find_model_file`` for a file that has to be there."""
    path = find_model_file(folder, name)
    if path is None:
        raise ModelError(f"{folder / name}: no such file")
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as fault:
        raise ModelError(f"{path}: not valid JSON: {fault}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must be a JSON object")
    return value
