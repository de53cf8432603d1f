"""What each step of the engine computed, and how long that took, as lines of JSON in a file.

Rule: one line for each step that computed anything,
``{"decoded": 8, "prefilled": 0, "ms": 6.21, "thread_ms": 6.2}``: rows of one token, tokens of
longer chunks, the step by the wall, and by the CPU time of the engine's own thread, which a busy
machine disturbs less (threads that help it do not count). Lines are added to what is there, so
executors of one kind may share a file; past ``max_bytes``, or once a line could not be written,
nothing more is: a full disk costs the log, and not the engine. ``bench.sim.calibrate`` reads it.
"""

import contextlib
import json
import time
from pathlib import Path

import structlog

from executor_svc.core.engine import Engine, StepOutput

_log = structlog.get_logger()


class StepLog:
    """Steps an engine and writes down what that was. Raises OSError if the file cannot be had."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        # by lines, so that a process that is killed leaves whole ones, and others can follow
        self._file = path.open("a", buffering=1, encoding="ascii")
        self._num_left = max_bytes - self._file.tell()

    def step(self, engine: Engine) -> StepOutput:
        """One step of the engine, from the thread that owns it."""
        began_s, thread_began_s = time.perf_counter(), time.thread_time()
        output = engine.step()
        ms = (time.perf_counter() - began_s) * 1000
        thread_ms = (time.thread_time() - thread_began_s) * 1000
        if output.num_decoded or output.num_prefilled:
            self._write(output, ms, thread_ms)
        return output

    def close(self) -> None:
        """Nothing is written any more."""
        with contextlib.suppress(OSError):  # it tries once more what it could not write
            self._file.close()

    def _write(self, output: StepOutput, ms: float, thread_ms: float) -> None:
        line = {
            "decoded": output.num_decoded,
            "prefilled": output.num_prefilled,
            "ms": round(ms, 3),
            "thread_ms": round(thread_ms, 3),
        }
        text = json.dumps(line) + "\n"
        self._num_left -= len(text)
        if self._num_left < 0:
            return
        try:
            self._file.write(text)
        except OSError as error:
            self._num_left = 0
            _log.warning("step_log.failed", path=self._file.name, cause=str(error))
