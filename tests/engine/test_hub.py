"""Models from the hub: what is asked of it, and what is said when it cannot be had."""

from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils._paths import filter_repo_objects

from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.loader import find_model
from tests.engine.driving import build, lease, run

# What the repositories of Llama and Mistral hold.
REPOSITORY = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "consolidated.safetensors",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "onnx/model.safetensors",
    "original/consolidated.00.pth",
    "original/tokenizer.model",
    "pytorch_model.bin",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_only_the_files_of_use_are_asked_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        assert repo_id == "owner/name"
        asked.extend(filter_repo_objects(REPOSITORY, allow_patterns=allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_model("owner/name") == folder
    assert asked == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "fault",
    [
        LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nTry again."),
        OfflineModeIsEnabled("Cannot reach the hub:\noffline mode is enabled."),
        HFValidationError("Repo id must not end with '-'."),
        httpx.ReadTimeout("The read\noperation timed out"),
        RuntimeError("Data processing error"),
        TimeoutError(),
    ],
    ids=repr,
)
def test_a_hub_that_cannot_be_had_is_one_line(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise fault

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError) as caught:
        find_model("models/my-model")
    text = str(caught.value)
    assert text.startswith("models/my-model: no such folder, and not to be had from the hub: ")
    assert "\n" not in text
    assert not text.endswith(": ")


def test_the_hub_cache_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert run(build(snapshot), lease(0, [5])).tokens[0]
