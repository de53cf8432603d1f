"""The servers that bench.gateway compares, each behind one address.

Peers live in an environment of their own, which make sets up. All but LitServe, which has its
engine inside, stand before the same fake server.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from bench.figures import cpu_s
from bench.gateway_fake import FAST, PACED, STEP_MS
from bench.stack import BIN, ROOT, Process, Stack
from hatch_build import compiled_core

PEERS_BIN = ROOT / ".venv-peers" / "bin"
_START_TIMEOUT_S = 60.0
_OFFLINE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # all on loopback
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load: where to ask, and whose CPU time is the gateway's and the engine's."""

    url: str
    gateway_pids: tuple[int, ...]
    engine_pids: tuple[int, ...]


def tree_cpu_s(pids: tuple[int, ...]) -> float:
    """User and system time of these processes with all that they started and that still run."""
    total = 0.0
    for pid in pids:
        total += cpu_s(pid)
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(OSError):
                total += cpu_s(child.pid)
    return total


@contextlib.contextmanager
def direct() -> Iterator[Target]:
    """The fake server without any gateway."""
    with _fake() as (url, pid):
        yield Target(url, (), (pid,))


@contextlib.contextmanager
def headway(packages: Path | None = None) -> Iterator[Target]:
    """Gateway, scheduler, and an executor for each of the two models.

    ``packages``: a folder whose packages the scheduler takes instead of ours.
    """
    stack = Stack()
    engines: list[Process] = []
    try:
        stack.start_scheduler({}, packages)
        for model, step_ms in ((FAST, 0), (PACED, STEP_MS)):
            settings = {
                "EXECUTOR_SCHEDULER_ADDRESSES": stack.scheduler_address,
                "EXECUTOR_EXECUTOR_ID": model,
                "EXECUTOR_MOCK_MODELS": model,
                "EXECUTOR_MOCK_STEP_MS": str(step_ms),
                "EXECUTOR_MAX_NUM_SEQS": "256",
            }
            engines.append(Process("python", ("-m", "bench.gateway_engine"), settings))
        for engine in engines:
            engine.wait_for("executor.attached")
        stack.start_gateway({})
        gateway_pids = (stack.gateway.pid, stack.scheduler.pid)
        yield Target(stack.gateway_url, gateway_pids, tuple(one.pid for one in engines))
    finally:
        stack.close()
        for engine in engines:
            engine.stop()


@contextlib.contextmanager
def headway_compiled() -> Iterator[Target]:
    """The same with a compiled core (docs/adr/0011-compiled-core.md), as a deployment has it."""
    folder = compiled_core()
    with headway(folder) as target:
        scheduler = psutil.Process(target.gateway_pids[1])
        mapped = (Path(one.path) for one in scheduler.memory_maps())
        assert any(path.is_relative_to(folder) for path in mapped), "the core is interpreted"
        yield target


@contextlib.contextmanager
def litellm() -> Iterator[Target]:
    """LiteLLM's proxy, one worker."""
    with _fake() as (url, fake_pid), TemporaryDirectory() as folder:
        models = [
            {
                "model_name": name,
                "litellm_params": {
                    "model": f"openai/{name}",
                    "api_base": f"{url}/v1",
                    "api_key": "none",
                },
            }
            for name in (FAST, PACED)
        ]
        config = Path(folder, "config.yaml")
        config.write_text(json.dumps({"model_list": models}))  # JSON is YAML
        port = _free_port()
        options = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        command = [str(PEERS_BIN / "litellm"), "--config", str(config), *options]
        with _peer(command, port, "/health/liveliness") as pid:
            yield Target(f"http://127.0.0.1:{port}", (pid,), (fake_pid,))


@contextlib.contextmanager
def sglang_router() -> Iterator[Target]:
    """SGLang's router, in Rust."""
    with _fake() as (url, fake_pid):
        port = _free_port()
        command = [
            *(str(PEERS_BIN / "python"), "-m", "sglang_router.launch_router"),
            *("--worker-urls", url, "--policy", "round_robin", "--log-level", "error"),
            *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(_free_port())),
        ]
        with _peer(command, port, "/health") as pid:
            yield Target(f"http://127.0.0.1:{port}", (pid,), (fake_pid,))


@contextlib.contextmanager
def litserve() -> Iterator[Target]:
    """LitServe with the fake engine in its worker process."""
    port = _free_port()
    script = str(Path(__file__).parent / "gateway_litserve.py")
    with _peer([str(PEERS_BIN / "python"), script, "--port", str(port)], port, "/health") as pid:
        yield Target(f"http://127.0.0.1:{port}", (pid,), ())


TARGETS: Mapping[str, Callable[[], contextlib.AbstractContextManager[Target]]] = {
    "direct": direct,
    "headway": headway,
    "headway_compiled": headway_compiled,
    "sglang_router": sglang_router,
    "litserve": litserve,
    "litellm": litellm,
}


@contextlib.contextmanager
def _fake() -> Iterator[tuple[str, int]]:
    command = [str(BIN / "python"), "-m", "bench.gateway_fake"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}", process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def _peer(command: list[str], port: int, health: str) -> Iterator[int]:
    """Runs while it is needed; its own log is only seen when it does not start."""
    with TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        env = {**os.environ, **_OFFLINE}
        process = subprocess.Popen(
            command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            if not _is_up(process, f"http://127.0.0.1:{port}{health}"):
                log.seek(0)
                raise RuntimeError(f"it does not start: {log.read()[-1_000:]}")
            yield process.pid
        finally:
            _end(process)


def _is_up(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310
            return True
        time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
        parent.terminate()
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
