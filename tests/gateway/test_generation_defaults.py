"""What generation_config.json may say, and what is made of the rest."""

import pytest
import structlog

from gateway_http.generation_defaults import GenerationDefaults, read_defaults


def test_a_file_that_makes_sense() -> None:
    text = (
        b'{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1]}'
    )
    assert read_defaults("m", text) == GenerationDefaults(0.6, 0.95, 20)
    assert read_defaults("m", b'{"temperature": 1, "top_k": null}') == GenerationDefaults(1.0)


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"\xff", b'{"a": ' * 10_000, b'{"temperature": NaN}', b'"\xed\xa0\x80"']
)
def test_a_file_that_cannot_be_read_says_nothing(text: bytes) -> None:
    with structlog.testing.capture_logs() as logs:
        assert read_defaults("m", text) == GenerationDefaults()
    assert [line["event"] for line in logs] == ["generation_config.refused"]


def test_no_file_is_no_mistake() -> None:
    with structlog.testing.capture_logs() as logs:
        assert read_defaults("m", b"") == GenerationDefaults()
    assert logs == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "-0.1"),
        ("temperature", "2.5"),
        ("temperature", '"hot"'),
        ("temperature", "true"),
        ("top_p", "0"),
        ("top_p", "1.5"),
        ("top_k", "-2"),
        ("top_k", "0.5"),
        ("top_k", "1" * 30),
        ("top_k", "[20]"),
    ],
)
def test_a_senseless_value_is_ignored_and_told_of_once(key: str, value: str) -> None:
    text = f'{{"{key}": {value}, "top_p": 0.5}}' if key != "top_p" else f'{{"top_p": {value}}}'
    with structlog.testing.capture_logs() as logs:
        defaults = read_defaults("m", text.encode())
    assert getattr(defaults, key) is None
    assert defaults.top_p == (None if key == "top_p" else 0.5)
    assert [(line["event"], line["key"]) for line in logs] == [("generation_config.ignored", key)]
