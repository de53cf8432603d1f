"""Build hook: turn protos/ into Python, beside the .proto files, before anything is packed."""

import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
SOURCE = ROOT / "protos"


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


class ProtoBuildHook(BuildHookInterface[Any]):
    """Runs ``generate`` for wheels, sdists and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate()


if __name__ == "__main__":
    generate()
