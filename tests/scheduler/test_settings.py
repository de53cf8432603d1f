"""Settings fail early and name the key."""

import dataclasses

import pytest
from pydantic import ValidationError

from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.settings import SchedulerSettings


def test_every_setting_of_the_core_is_here_with_its_default() -> None:
    assert SchedulerSettings().core() == CoreSettings()
    for field in dataclasses.fields(CoreSettings):
        assert SchedulerSettings.model_fields[field.name].description


def test_an_open_address_needs_the_flag() -> None:
    with pytest.raises(ValidationError, match="allow_insecure"):
        SchedulerSettings(host="0.0.0.0")
    exposed = SchedulerSettings(host="0.0.0.0", allow_insecure=True)
    assert not exposed.has_reflection
    assert SchedulerSettings(host="::1").has_reflection
    assert SchedulerSettings(host="::1", port=1).address == "[::1]:1"


@pytest.mark.parametrize(
    "values",
    [
        {"heartbeat_timeout_ms": 1_500},
        {"default_band": 4},
        {"stall_timeout_ms": 1_500},
        {"retry_after_min_ms": 70_000},
        {"max_samples": 0},
        {"no_such_key": 1},
    ],
)
def test_senseless_values_fail(values: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values)).split("_")[0]):
        SchedulerSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [{"max_frame_tokens": 1 << 20, "max_message_bytes": 1 << 20}, {"max_orders_bytes": 1 << 29}],
)
def test_what_is_sent_fits_into_a_message(values: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="max_message_bytes"):
        SchedulerSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warm_bonus", -1),
        ("aging_equalization_ms", 0),
        ("band_min_shares", (0.5, 0.5)),
        ("band_max_wait_ms", (0,)),
        ("band_queue_shares", (1.5,)),
        ("tenant_weights", {"a": 0}),
        ("model_hold_ms", -1),
        ("switch_time_share", 0),
        ("switch_time_share", 1.5),
        ("model_limits", {"m": 0}),
        ("load_backoff_max_ms", 10),
        ("session_ttl_ms", 0),
    ],
)
def test_senseless_policies_fail_naming_the_key(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        SchedulerSettings(**{name: value})  # type: ignore[arg-type]
