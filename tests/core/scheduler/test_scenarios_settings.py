"""Scenarios 1-5: defaults, files, precedence, senseless values.

Keys of the reference -> ours: session_idle_ttl = session_ttl_ms; model_affinity_sched_bonus =
warm_bonus; queue_aging_equalization = aging_equalization_ms; slot_wait_timeout =
default_queue_timeout_ms; poll_interval = heartbeat_interval_ms; api_keys = the gateway's;
max_models = the executor's. There is no list of backends: executors dial in.
"""

from pathlib import Path

import pytest

from executor_svc.settings import ExecutorSettings
from gateway_http.settings import GatewaySettings
from headway.settings import Settings
from scheduler_svc.settings import SchedulerSettings


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty file for every process; they are read from now on."""
    for cls in (SchedulerSettings, GatewaySettings, ExecutorSettings):
        path = tmp_path / f"{cls.config_env}.toml"
        path.write_text("")
        monkeypatch.setenv(cls.config_env, str(path))
    return tmp_path


def write(files: Path, cls: type[Settings], text: str) -> None:
    (files / f"{cls.config_env}.toml").write_text(text)


def test_scenario_01_defaults() -> None:
    """Settled otherwise: the hybrid order is on by default; 0 still means FIFO."""
    settings = SchedulerSettings.load("scheduler", [])
    assert settings.session_ttl_ms == 300_000
    assert settings.aging_equalization_ms == 30_000
    assert settings.warm_bonus == 10
    assert not settings.core().is_fifo
    assert SchedulerSettings(warm_bonus=0).core().is_fifo
    assert settings.model_limits == {}
    assert GatewaySettings.load("gateway", []).api_keys == ()
    assert "backends" not in SchedulerSettings.model_fields


def test_scenario_02_a_small_file_leaves_the_rest_alone(files: Path) -> None:
    write(files, SchedulerSettings, "warm_bonus = 7")
    settings = SchedulerSettings.load("scheduler", [])
    assert settings.warm_bonus == 7
    assert settings.model_copy(update={"warm_bonus": 3}) == SchedulerSettings(warm_bonus=3)


def test_scenario_03_every_key_of_a_file_is_read(files: Path) -> None:
    text = """
        heartbeat_interval_ms = 2_000
        default_queue_timeout_ms = 60_000
        session_ttl_ms = 600_000
        warm_bonus = 10
        aging_equalization_ms = 30_000
        model_hold_ms = 3_000
        model_limits = {big = 1}
    """
    write(files, SchedulerSettings, text)
    write(
        files,
        GatewaySettings,
        'api_keys = "team=key"\nsigning_key = "0123456789abcdef"\nscheduler_addresses = "a:1,b:2"',
    )
    write(files, ExecutorSettings, 'executor_id = "e"\nmax_models = 2')
    settings = SchedulerSettings.load("scheduler", [])
    assert settings.heartbeat_interval_ms == 2_000
    assert settings.default_queue_timeout_ms == 60_000
    core = settings.core()
    assert core.session_ttl_ms == 600_000
    assert (core.warm_bonus, core.aging_equalization_ms, core.model_hold_ms) == (10, 30_000, 3_000)
    assert dict(core.model_limits) == {"big": 1}
    gateway = GatewaySettings.load("gateway", [])
    assert [key.get_secret_value() for key in gateway.api_keys] == ["team=key"]
    assert gateway.scheduler_addresses == ("a:1", "b:2")
    executor = ExecutorSettings.load("executor", [])
    assert (executor.executor_id, executor.max_models) == ("e", 2)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("warm_bonus = -1", "warm_bonus"),
        ("aging_equalization_ms = 0", "aging_equalization_ms"),
        ("aging_equalization_ms = -5", "aging_equalization_ms"),
        ("model_hold_ms = -1", "model_hold_ms"),
        ("max_slots_per_executor = 0", "max_slots_per_executor"),
        ("model_limits = {big = -1}", "model_limits"),
        ("max_queue_skip = 3", "max_queue_skip"),
    ],
)
def test_scenario_04_senseless_values_and_unknown_keys_are_named(
    files: Path, text: str, key: str
) -> None:
    write(files, SchedulerSettings, text)
    with pytest.raises(SystemExit, match=key):
        SchedulerSettings.load("scheduler", [])


def test_scenario_05_command_line_beats_environment_beats_file(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(files, SchedulerSettings, "warm_bonus = 1")
    assert SchedulerSettings.load("scheduler", []).warm_bonus == 1
    monkeypatch.setenv("SCHEDULER_WARM_BONUS", "2")
    assert SchedulerSettings.load("scheduler", []).warm_bonus == 2
    assert SchedulerSettings.load("scheduler", ["--warm-bonus", "3"]).warm_bonus == 3
