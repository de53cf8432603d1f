"""Model files: find them, check them, read one tensor at a time.

Rule: only safetensors, and every check comes before the first tensor is read. A checkpoint must
hold exactly the tensors that the decoder asks for, in their shapes. Old Llama checkpoints also
hold rotary frequencies; these are computed from the config as they were, so they are passed over.

What is read is a view of the file, which costs no memory; whoever keeps it copies it, because a
file that is overwritten would change the model under its requests, and one that is cut short
would kill the process.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from executor_svc.core.engine import ModelAssets
from executor_svc.torch_engine.files import (
    ModelError,
    find_model_file,
    model_file,
    read_json_object,
)

Read = Callable[..., torch.Tensor]  # (name, part)

_INDEX = "model.safetensors.index.json"
_ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FLOATS = ("F32", "BF16", "F16")
_ROTARY_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# Not all of a repository: many hold the weights again in other formats.
_WANTED = ("config.json", "model.safetensors", "model-*.safetensors", _INDEX, *_ASSETS)


def find_model(source: str) -> Path:
    """The folder of a model: ``source`` itself, or the local snapshot of a hub id."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(source):
        raise ModelError(f"{source}: neither a folder nor a hub id (owner/name)")
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED)))
    except Exception as fault:  # the hub, its HTTP client and its downloader have no common base
        cause = " ".join(str(fault).split()) or repr(fault)
        raise ModelError(
            f"{hub_id}: no such folder, and not to be had from the hub: {cause}"
        ) from fault


def read_assets(folder: Path) -> ModelAssets:
    """The files that a gateway needs; without a tokenizer.json all of them are empty."""
    paths = {name: find_model_file(folder, name) for name in _ASSETS}
    if paths["tokenizer.json"] is None:
        return ModelAssets(b"", b"", "", b"")
    contents = {name: path.read_bytes() if path else b"" for name, path in paths.items()}
    try:
        chat_template = contents["chat_template.jinja"].decode()
    except UnicodeDecodeError as fault:
        raise ModelError(f"{paths['chat_template.jinja']}: not UTF-8: {fault}") from None
    tokenizer_config = paths["tokenizer_config.json"]
    if not chat_template and tokenizer_config is not None:
        chat_template = _template_of(read_json_object(tokenizer_config))
    return ModelAssets(
        tokenizer_json=contents["tokenizer.json"],
        tokenizer_config_json=contents["tokenizer_config.json"],
        chat_template=chat_template,
        generation_config_json=contents["generation_config.json"],
    )


def _template_of(tokenizer_config: dict[str, Any]) -> str:
    """The chat template inside a tokenizer config: a text, or the "default" of a named list."""
    template = tokenizer_config.get("chat_template") or ""
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get("default") or ""
    return template if isinstance(template, str) else ""


def assets_digest(assets: ModelAssets) -> str:
    """Hex SHA-256 over the SHA-256 of each asset, so that no two can flow into each other."""
    parts = (
        assets.tokenizer_json,
        assets.tokenizer_config_json,
        assets.chat_template.encode(),
        assets.generation_config_json,
    )
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


class Checkpoint:
    """The checked safetensors files of a model folder.

    ``shapes`` are the tensors that the model needs; ``ignored`` may be present all the same.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], *, ignored: Iterable[str] = ()
    ) -> None:
        self._folder = folder
        self._files = {name: model_file(folder, name) for name in _weight_files(folder)}
        self._identities = {path: _identity(path) for path in self._files.values()}
        self._file_of = self._check(shapes, frozenset(ignored))

    @contextmanager
    def open(self) -> Iterator[Read]:
        """Gives ``read(name, part)``: a tensor or a part of it, in the dtype in which it is stored.

        Raises ModelError if a file is not the one that was checked.
        """
        with ExitStack() as stack:
            files = {name: stack.enter_context(_open(path)) for name, path in self._files.items()}
            for path in self._files.values():
                if _identity(path) != self._identities[path]:
                    raise ModelError(f"{path}: has changed since it was checked")

            def read(name: str, part: tuple[slice, ...] = ()) -> torch.Tensor:
                file = files[self._file_of[name]]
                return file.get_slice(name)[part] if part else file.get_tensor(name)

            yield read

    def digest(self) -> str:
        """Hex SHA-256 of what ``sha256sum config.json *.safetensors`` prints (files by name).

        The config is part of it because the same weights under another one are another model.
        """
        lines = hashlib.sha256()
        for name in ("config.json", *sorted(self._files)):
            with model_file(self._folder, name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.update(f"{digest}  {name}\n".encode())
        return lines.hexdigest()

    def _check(
        self, shapes: Mapping[str, tuple[int, ...]], ignored: frozenset[str]
    ) -> dict[str, str]:
        """Compare every header with what the model needs; returns the file of each tensor."""
        file_of: dict[str, str] = {}
        for file_name, path in self._files.items():
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name in ignored or _ROTARY_FREQUENCIES.fullmatch(name):
                        continue
                    if name not in shapes:
                        raise ModelError(f"{path}: unexpected tensor {name}")
                    if name in file_of:
                        raise ModelError(f"{path}: tensor {name} is also in {file_of[name]}")
                    header = file.get_slice(name)
                    if (shape := tuple(header.get_shape())) != shapes[name]:
                        raise ModelError(
                            f"{path}: tensor {name} has shape {shape}, expected {shapes[name]}"
                        )
                    if (dtype := header.get_dtype()) not in _FLOATS:
                        raise ModelError(f"{path}: tensor {name} has dtype {dtype}")
                    file_of[name] = file_name
        if missing := sorted(shapes.keys() - file_of.keys()):
            raise ModelError(f"{self._folder}: {len(missing)} tensors missing, first {missing[0]}")
        return file_of


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files: those of the index if there is one, else the single file."""
    index = find_model_file(folder, _INDEX)
    if index is None:
        return ["model.safetensors"]
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map: must be an object that is not empty")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: weight_map: {name!r} is not a safetensors file")
    return sorted(set(weight_map.values()))


def _identity(path: Path) -> tuple[int, ...]:
    """Differs where the file was written or replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open(path: Path) -> Any:
    """Open a safetensors file; the library checks the header's length, JSON, offsets and size."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as fault:
        raise ModelError(f"{path}: not a sound safetensors file: {fault}") from None
