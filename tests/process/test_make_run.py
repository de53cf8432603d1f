"""``make run``: Ctrl-C ends all of it cleanly, also while there is work; so does a hang-up."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from bench.stack import ROOT

# Set up or not is for whoever runs the tests; this is no test of pip.
MAKE = ["make", "--assume-old=.venv/.ready"]
NAMES = {"scheduler.1", "executor.1", "executor.2", "gateway.1"}
ENDLESS = {"model": "mock", "prompt": [1, 2, 3], "max_tokens": 30_000, "ignore_eos": True}

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "honcho").exists(), reason="make test sets up .venv"
)


class Run:
    """The command in a foreground process group of its own, as at a terminal."""

    def __init__(self, gateway_port: int, scheduler_port: int) -> None:
        self.url = f"http://127.0.0.1:{gateway_port}"
        ports = [f"GATEWAY_PORT={gateway_port}", f"SCHEDULER_PORT={scheduler_port}"]
        self._popen = subprocess.Popen(
            [*MAKE, "run", *ports],
            cwd=ROOT,
            env={**os.environ, "EXECUTOR_ENGINE": "mock", "EXECUTOR_MOCK_STEP_MS": "20"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=hear,
        )
        self.text = ""

    def read_until(self, condition: Callable[[str], bool]) -> None:
        """Take lines until what was said fulfils the condition."""
        assert self._popen.stdout is not None
        while not condition(self.text):
            line = self._popen.stdout.readline()
            assert line, self.text
            self.text += line

    def read_rest(self) -> None:
        """Everything up to the end of the last process that can still speak."""
        assert self._popen.stdout is not None
        self.text += self._popen.stdout.read()

    def interrupt(self) -> None:
        """Ctrl-C: the terminal tells the whole foreground group."""
        os.killpg(self._popen.pid, signal.SIGINT)

    def hang_up(self) -> None:
        """The terminal closes: its foreground group is told, and nobody reads any more."""
        assert self._popen.stdout is not None
        os.killpg(self._popen.pid, signal.SIGHUP)
        self._popen.stdout.close()

    def stopped(self) -> dict[str, int]:
        """How each process ended."""
        return {
            name: int(status) for name, status in find(r"(\S+) stopped \(rc=(.+?)\)", self.text)
        }

    def groups(self) -> dict[str, int]:
        """The process group of each process: honcho gives every one its own."""
        return {name: int(pid) for name, pid in find(r"(\S+) started \(pid=(\d+)\)", self.text)}

    def close(self) -> None:
        """Kill what a failed test has left."""
        for group in (self._popen.pid, *self.groups().values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        assert self._popen.stdout is not None
        self._popen.stdout.close()
        self._popen.wait()


def hear() -> None:
    """As a terminal's programs do, even if whoever runs the tests was told to ignore hang-ups."""
    for one in (signal.SIGHUP, signal.SIGINT):
        signal.signal(one, signal.SIG_DFL)


def find(pattern: str, text: str) -> list[tuple[str, str]]:
    return re.findall(rf"system +\| {pattern}", text)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        plugs = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [plug.getsockname()[1] for plug in plugs]


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run(*free_ports(2))
    try:
        run.read_until(
            lambda text: (
                text.count('"event":"executor.attached","process":"executor"') == 2
                and "scheduler.connected" in text
            )
        )
        yield run
    finally:
        run.close()


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_everything_cleanly(run: Run) -> None:
    with (
        httpx.Client(base_url=run.url, timeout=60) as http,
        http.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines).startswith(("id: ", "data: "))
        run.interrupt()
        last = [line for line in lines if line.startswith("data: ")][-1]
    run.read_rest()
    assert '"code":"draining"' in last, "whoever is served is told"
    assert run.stopped() == dict.fromkeys(NAMES, 0)
    assert "SIGKILL" not in run.text
    assert [name for name, group in run.groups().items() if is_there(group)] == []


def test_an_executor_that_is_killed_comes_back(run: Run) -> None:
    (executor,) = psutil.Process(run.groups()["executor.1"]).children()  # of the shell
    executor.kill()
    attached = '"event":"executor.attached","process":"executor"'
    run.read_until(lambda text: text.count(attached) == 3)
    run.interrupt()
    run.read_rest()
    assert run.stopped() == dict.fromkeys(NAMES, 0)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="only Linux can tie a process to another")
def test_a_terminal_that_closes_leaves_nobody_behind(run: Run) -> None:
    leaders = [psutil.Process(group) for group in run.groups().values()]
    everybody = [one for leader in leaders for one in (leader, *leader.children(recursive=True))]
    assert len(everybody) == len(NAMES) + 2, "an executor has a shell"
    run.hang_up()
    _, alive = psutil.wait_procs(everybody, timeout=60)
    # whoever inherits them may take its time to bury them
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
