"""The base of every process's settings: command line > environment > TOML file > default.

A process subclasses ``Settings`` with its own env prefix, gives every field a unit in its name
and a description (which is its ``--help``), and calls ``load`` once in ``__main__``.
"""

import ipaddress
import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)


class Settings(BaseSettings):
    """Frozen, typed, and strict: unknown keys and senseless values fail, naming the key."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        use_attribute_docstrings=True,
    )

    config_env: ClassVar[str] = ""
    """The environment variable that names the TOML file, such as SCHEDULER_CONFIG."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        name = os.environ.get(cls.config_env)
        if not name:
            return init_settings, env_settings
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"{cls.config_env}: no such file: {path}")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    @classmethod
    def load(cls, prog: str, argv: list[str] | None = None) -> Self:
        """Build from the command line, or end the process with one line for each bad key."""
        try:
            _refuse_unknown_environment(cls)
            arguments: Any = {
                "_cli_prog_name": prog,
                "_cli_parse_args": True if argv is None else argv,
            }
            return cls(**arguments)
        except ValidationError as error:
            lines = (
                f"{prog}: {'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}"
                for item in error.errors()
            )
            sys.exit("\n".join(lines))
        except (OSError, ValueError, tomllib.TOMLDecodeError) as error:
            sys.exit(f"{prog}: {error}")


def _refuse_unknown_environment(cls: type[Settings]) -> None:
    """A misspelt variable would otherwise be ignored in silence."""
    prefix = cls.model_config.get("env_prefix", "")
    known = {f"{prefix}{name}".upper() for name in cls.model_fields} | {cls.config_env}
    for name in sorted(os.environ):
        if prefix and name.startswith(prefix.upper()) and name not in known:
            raise ValueError(f"unknown environment variable {name}")


def check_addresses(name: str, addresses: Sequence[str]) -> None:
    """Raises ValueError, naming the setting, unless each is host:port."""
    if not addresses:
        raise ValueError(f"{name}: at least one is needed")
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
            raise ValueError(f"{name}: {address!r} is not host:port")


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
