"""Tries a grammar in a process that can be killed, before it is compiled where sequences run.

A schema of a few bytes can keep llguidance busy for minutes (``multipleOf`` with a large number),
which none of its limits prevents, and nothing ends a thread. So each grammar is compiled twice: in
a child, whose kernel ends it at a deadline or at a limit of memory, and, if it got through, once
more here, which takes about as long and as much.

A child serves many grammars, one line of JSON each way, and ends with its input or at a deadline.
"""

import json
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import IO

_MODULE = "executor_svc.torch_engine.grammar"  # the only one that may import llguidance
_READY = "ready"


class GrammarChecker:
    """One child, started when it is needed. For one thread at a time."""

    def __init__(self, timeout_ms: int, max_bytes: int) -> None:
        self._arguments = [str(timeout_ms), str(max_bytes)]
        self._timeout_ms = timeout_ms
        self._child: subprocess.Popen[str] | None = None

    def problem(self, source: str, max_states: int) -> str:
        """What is wrong with a grammar in llguidance's form, in llguidance's words; or nothing."""
        if self._child is None:
            self._child = subprocess.Popen(  # noqa: S603 - ourselves, and numbers
                [sys.executable, "-m", _MODULE, *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            weakref.finalize(self, _end, self._child)
            if self._answer() != _READY:
                self.close()
                return "this executor cannot check grammars"
        try:
            self._input.write(json.dumps([source, max_states]) + "\n")
            self._input.flush()
            answer = self._answer()
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.close()
            return f"compiling it takes more than {self._timeout_ms} ms, or too much memory"
        return answer

    def close(self) -> None:
        """End the child; the next grammar gets a new one."""
        child, self._child = self._child, None
        if child is not None:
            _end(child)

    @property
    def _input(self) -> IO[str]:
        assert self._child is not None
        assert self._child.stdin is not None
        return self._child.stdin

    def _answer(self) -> str | None:
        """The child's next line; None if it has ended."""
        assert self._child is not None
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        return str(json.loads(line)) if line.endswith("\n") else None


def _end(child: "subprocess.Popen[str]") -> None:
    if child.returncode is None:
        child.kill()
        child.communicate()


def serve(compile_problem: Callable[[str, int], str]) -> None:
    """The child's whole life; ``compile_problem`` says what is wrong with a grammar, or nothing."""
    timeout_ms, max_bytes = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes our input
    _tell(_READY)
    for line in sys.stdin:
        source, max_states = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_ms / 1000)
        problem = compile_problem(source, max_states)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _tell(problem)


def _tell(word: str) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()
