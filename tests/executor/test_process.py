"""The real process: settings, signals, exit status."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from executor_svc.__main__ import build_engine
from executor_svc.settings import BUILTIN_MODEL, ExecutorSettings
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from tests.executor.linked import grant, ref
from tests.executor.scripted_scheduler import TIMEOUT_S, ScriptedScheduler

# An executor whose first step never ends, in torch: a thread there dies hard.
HANGING = """
import torch
from executor_svc import __main__ as executor
from executor_svc.mock_engine import MockConfig, MockEngine

class HangingEngine(MockEngine):
    def step(self):
        x = torch.ones(300, 300)
        while True:
            x = torch.tanh(x @ x)

executor.build_engine = lambda settings: HangingEngine(MockConfig())
executor.main()
"""


@contextlib.asynccontextmanager
async def started(
    scheduler: ScriptedScheduler, *arguments: str, script: str = ""
) -> AsyncIterator[asyncio.subprocess.Process]:
    """An executor of this scheduler, which is gone afterwards, whatever happens."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(["-c", script] if script else ["-m", "executor_svc"]),
        "--engine=mock",
        "--mock-step-ms=1",
        f"--scheduler-addresses={scheduler.address}",
        *arguments,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def _finish(process: asyncio.subprocess.Process) -> tuple[int | None, list[str]]:
    """Exit status and the events that were logged."""
    async with asyncio.timeout(TIMEOUT_S):
        _, stderr = await process.communicate()
    return process.returncode, [json.loads(line)["event"] for line in stderr.splitlines()]


async def test_a_process_serves_and_sigterm_drains_it(scheduler: ScriptedScheduler) -> None:
    async with started(scheduler, "--executor-id=e7") as process:
        attachment = await scheduler.attached()
        assert attachment.hello.executor_id == "e7"
        attachment.welcome()
        attachment.order(grants=[grant("a", 1, max_tokens=100)])
        await attachment.until_tokens(1, 1)
        process.send_signal(signal.SIGTERM)
        ended = await attachment.until_ended("a")
        assert ended.outcome == fleet.LeaseEnded.OUTCOME_COMPLETED
        attachment.order(acknowledged=[ref("a")])
        await attachment.next("close")
        attachment.close()
        status, events = await _finish(process)
    assert status == 0
    assert events == ["executor.attached", "executor.detached", "server.stopped"]


async def test_a_step_that_hangs_does_not_spoil_the_exit_status(
    scheduler: ScriptedScheduler,
) -> None:
    """134 would look like a crash, and whoever restarts crashed processes would restart it."""
    hasty = ("--drain-timeout-ms=50", "--flush-timeout-ms=200")
    async with started(scheduler, *hasty, script=HANGING) as process:
        attachment = await scheduler.welcomed()
        attachment.order(grants=[grant("a", 1, max_tokens=100)])
        while list((await attachment.next("heartbeat")).handles) != [1]:
            pass
        process.send_signal(signal.SIGTERM)
        ended = await attachment.until_ended("a")
        assert ended.outcome == fleet.LeaseEnded.OUTCOME_RETURNED
        status, events = await _finish(process)
    assert (status, events[-1]) == (0, "server.stopped")


async def test_a_refused_process_ends_with_1(scheduler: ScriptedScheduler) -> None:
    async with started(scheduler) as process:
        attachment = await scheduler.attached()
        attachment.close(HeadwayError(Reason.INVALID_REQUEST, "no"))
        status, events = await _finish(process)
    assert (status, events) == (1, ["executor.refused", "server.stopped"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--scheduler-addresses=here"],
        ["--scheduler-addresses=,"],
        ["--mock-models=a,a"],
        ["--max-num-seqs=600"],
        ["--backoff-max-ms=1"],
        ["--model=,"],
        ["--model=a="],
        ["--model==org/model"],
        ["--model=a=org/x,a=org/y"],
        ["--model-name=x", "--model=org/x,org/y"],
        ["--max-models=-1"],
    ],
)
def test_senseless_settings_name_the_key(arguments: list[str]) -> None:
    key = arguments[0].split("=")[0].strip("-").replace("-", "_")
    key = {"max_num_seqs": "max_num_batched_tokens"}.get(key, key)
    with pytest.raises(SystemExit, match=key):
        ExecutorSettings.load("headway-executor", arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=/no/where"], "model: /no/where: neither a folder nor a hub id"),
        (["--model=../no-where"], "model: ../no-where: neither a folder nor a hub id"),
        (["--model={folder}"], "config.json: no such file"),
        (["--model={builtin}/config.json"], "neither a folder nor a hub id"),
        (["--device=banana"], "device: 'banana' is not cpu or cuda"),
        (["--device=meta"], "device: 'meta' is not cpu or cuda"),
        (["--device=cuda:99"], "device: cuda:99 is not there"),
        (["--num-blocks=1000000000000"], "model: .* weights and KV cache need"),
    ],
    ids=str,
)
def test_an_engine_that_cannot_be_built_says_why_in_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    names = {"folder": tmp_path, "builtin": BUILTIN_MODEL}
    arguments = [argument.format(**names) for argument in arguments]
    settings = ExecutorSettings.load("headway-executor", arguments)
    with pytest.raises(SystemExit, match=message) as caught:
        build_engine(settings)
    text = str(caught.value.code)
    assert text.startswith("headway-executor: ")
    assert "\n" not in text


async def test_threads_of_torch_spin_as_long_as_the_settings_say() -> None:
    script = """
from executor_svc.__main__ import build_engine
from executor_svc.settings import ExecutorSettings
build_engine(ExecutorSettings(openmp_spin_count=1234))
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script),
        env={**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"},
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        _, stderr = await process.communicate()
    assert "GOMP_SPINCOUNT = '1234'" in stderr.decode()


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_bytes(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "config.json").touch()
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(SystemExit, match=r"Permission denied: '.*config\.json'"):
        build_engine(ExecutorSettings(model=str(tmp_path)))


def test_models_and_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()

    def models(text: str, name: str = "") -> tuple[tuple[str, str], ...]:
        return ExecutorSettings(model=text, model_name=name).torch_models

    assert ExecutorSettings().torch_models == (("headway/tiny-pydoc", str(BUILTIN_MODEL)),)
    assert models(str(folder)) == (("my-model", str(folder)),)
    assert models("org/model") == (("org/model", "org/model"),)
    assert models("org/model", "x") == (("x", "org/model"),)
    assert models(f"a = {folder}, org/model ,b=org/other") == (
        ("a", str(folder)),
        ("org/model", "org/model"),
        ("b", "org/other"),
    )
