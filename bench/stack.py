"""Real processes for benchmarks and tests: scheduler, executors, gateway on free loopback ports."""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
_PATH = (ROOT, ROOT / "protos")
_STARTUP_TIMEOUT_S = 90.0


class Process:
    """One of our processes; its JSON log lines can be waited for."""

    started: ClassVar[weakref.WeakSet["Process"]] = weakref.WeakSet()
    """All that somebody still has a use for."""

    def __init__(self, name: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.started.add(self)
        self.name = name
        self.lines: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._is_closed = False
        self._popen = subprocess.Popen(
            [str(BIN / name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **env},
            cwd=ROOT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def _read(self) -> None:
        assert self._popen.stderr is not None
        for text in self._popen.stderr:
            try:
                line = json.loads(text)
            except ValueError:
                line = {"event": "text", "text": text.rstrip()}
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._is_closed = True
            self._news.notify_all()

    def wait_for(
        self,
        event: str,
        where: Callable[[dict[str, Any]], bool] = lambda line: True,
        timeout_s: float = _STARTUP_TIMEOUT_S,
        start: int = 0,
    ) -> dict[str, Any]:
        """The first log line of this event, from line ``start`` on; fails if the process ends
        before it comes."""

        def find() -> dict[str, Any] | None:
            return next(
                (x for x in self.lines[start:] if x.get("event") == event and where(x)), None
            )

        with self._news:
            self._news.wait_for(lambda: find() or self._is_closed, timeout_s)
            line = find()
        tail = "\n".join(str(x) for x in self.lines[-20:])
        assert line is not None, f"{self.name}: no {event} in\n{tail}"
        return line

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Warnings, errors, and what is no log line: the interpreter's and the libraries' own."""
        levels = ("warning", "error", "critical")
        return [x for x in self.lines if x.get("level") in levels or x.get("event") == "text"]

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._popen.kill()
        self.wait()

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit status."""
        status = self._popen.wait(timeout_s)
        self._reader.join()
        assert self._popen.stderr is not None
        self._popen.stderr.close()
        return status

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, then SIGKILL if that takes too long."""
        if self._popen.poll() is None:
            self._popen.terminate()
        try:
            return self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self.wait()


class Stack:
    """A whole installation; every process has its own settings by environment variables."""

    def __init__(self) -> None:
        self.executors: list[Process] = []
        self._processes: list[Process] = []
        self._num_executors = 0
        self.scheduler_address = ""
        self.gateway_url = ""

    @classmethod
    def start(
        cls,
        *,
        executors: int = 1,
        engine: str = "mock",
        scheduler: Mapping[str, object] | None = None,
        executor: Mapping[str, object] | None = None,
        gateway: Mapping[str, object] | None = None,
        has_gateway: bool = True,
    ) -> Self:
        """Start everything and wait until it serves.

        The mappings are settings, such as ``{"max_inflight": 100}``.
        """
        stack = cls()
        try:
            stack.start_scheduler(scheduler or {})
            for _ in range(executors):
                stack.start_executor({"engine": engine, **(executor or {})})
            for process in stack.executors:
                process.wait_for("executor.attached")
            if has_gateway:
                stack.start_gateway(gateway or {})
        except BaseException:
            stack.close()
            raise
        return stack

    def start_scheduler(
        self, settings: Mapping[str, object], packages: Path | None = None
    ) -> Process:
        """``packages``: a folder whose packages are imported instead of ours of the same name."""
        env = {"PYTHONPATH": os.pathsep.join(map(str, (packages, *_PATH)))} if packages else {}
        self.scheduler = self._spawn("headway-scheduler", {"port": 0, **settings}, env)
        port = self.scheduler.wait_for("server.started")["port"]
        self.scheduler_address = f"127.0.0.1:{port}"
        return self.scheduler

    def start_executor(self, settings: Mapping[str, object]) -> Process:
        self._num_executors += 1
        defaults = {
            "scheduler_addresses": self.scheduler_address,
            "executor_id": f"executor-{self._num_executors}",
        }
        process = self._spawn("headway-executor", {**defaults, **settings})
        self.executors.append(process)
        return process

    def start_gateway(self, settings: Mapping[str, object]) -> Process:
        defaults = {"scheduler_addresses": self.scheduler_address, "port": 0}
        self.gateway = self._spawn("headway-gateway", {**defaults, **settings})
        port = self.gateway.wait_for("server.started")["port"]
        self.gateway_url = f"http://127.0.0.1:{port}"
        return self.gateway

    def _spawn(
        self, name: str, settings: Mapping[str, object], env: Mapping[str, str] | None = None
    ) -> Process:
        prefix = name.removeprefix("headway-").upper()
        own = {f"{prefix}_{key.upper()}": str(value) for key, value in settings.items()}
        process = Process(name, (), {**own, **(env or {})})
        self._processes.append(process)
        return process

    def close(self) -> None:
        """Stop what still runs, clients' side first."""
        for process in reversed(self._processes):
            process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
