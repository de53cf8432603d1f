"""Settings: which source wins, and what a mistake is answered with."""

from pathlib import Path

import pytest
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from headway.settings import Settings


class Example(Settings):
    """Two fields of a process that does not exist."""

    model_config = SettingsConfigDict(env_prefix="EXAMPLE_")
    config_env = "EXAMPLE_CONFIG"

    max_wait_ms: int = Field(10, ge=1, description="Longest wait, in milliseconds.")
    key: SecretStr = Field(SecretStr(""), description="A secret.")


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "example.toml"
    monkeypatch.setenv("EXAMPLE_CONFIG", str(path))
    return path


def refused(*argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        Example.load("example", list(argv))
    return str(caught.value.code)


def test_command_line_beats_environment_beats_file_beats_default(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml.write_text("")
    assert Example.load("example", []).max_wait_ms == 10
    toml.write_text("max_wait_ms = 20")
    assert Example.load("example", []).max_wait_ms == 20
    monkeypatch.setenv("EXAMPLE_MAX_WAIT_MS", "30")
    assert Example.load("example", []).max_wait_ms == 30
    assert Example.load("example", ["--max-wait-ms", "40"]).max_wait_ms == 40


def test_unknown_key_in_the_file_is_named(toml: Path) -> None:
    toml.write_text("max_wait_s = 20")
    assert "max_wait_s" in refused()


def test_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_MAX_WIAT_MS", "20")
    assert "EXAMPLE_MAX_WIAT_MS" in refused()


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1e400", ""])
def test_senseless_value_names_its_key(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_MAX_WAIT_MS", value)
    assert "max_wait_ms" in refused()


def test_broken_and_missing_files_are_named(toml: Path) -> None:
    assert "no such file" in refused()
    toml.write_text("max_wait_ms =")
    assert "example" in refused()


def test_secrets_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_KEY", "hunter2")
    settings = Example.load("example", [])
    assert settings.key.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(settings)


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Example.load("example", []).max_wait_ms = 3  # type: ignore[misc]
