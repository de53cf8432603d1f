"""Structured logs: an event is a constant ``noun.past_verb``, its values are keys.

Pretty on a terminal, JSON lines elsewhere. Never a prompt, a completion, a key or a header.
"""

import asyncio
import atexit
import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

import orjson
import structlog

# Local variables hold prompts and keys; the defaults of both renderers would print them.
_plain = structlog.dev.plain_traceback
_without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


class Lines:
    """Where lines go: all of one turn of the event loop leave in one write.

    A write costs as much as the line did. Warnings and worse are written at once, for they may be
    the last words of a process; so is each line outside a loop, and in other threads. For structlog
    this is a logger.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: list[bytes] = []
        self._due_in: asyncio.AbstractEventLoop | None = None
        self._due_thread = 0  # of that loop
        self._lock = threading.Lock()

    def msg(self, line: bytes) -> None:
        """Takes a line without its end."""
        with self._lock:
            self._lines.append(line)
        if self._is_due():
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.write()
            return
        self._due_in, self._due_thread = loop, threading.get_ident()
        loop.call_soon(self.write)

    debug = info = msg

    def _is_due(self) -> bool:
        """Whether the loop that runs in this thread will write: one that ended early may owe us its
        turn. Which loop runs is a system call to ask."""
        due_in = self._due_in
        if due_in is None or self._due_thread != threading.get_ident():
            return False
        return due_in.is_running()

    def urgent(self, line: bytes) -> None:
        """Takes a line that must not wait."""
        with self._lock:
            self._lines.append(line)
        self.write()

    warning = error = critical = urgent

    def write(self) -> None:
        """What has gathered. It is lost if nobody reads any more, which must stop no work."""
        with self._lock:
            self._due_in = None
            if self._lines:
                data = b"\n".join([*self._lines, b""])
                self._lines.clear()
                with contextlib.suppress(OSError):
                    self._file.write(data)
                    self._file.flush()


def _made_printable(
    logger: object, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """A terminal obeys what others may have put into a path or a name."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = value.encode("unicode_escape").decode()
    return event


_open: list[Lines] = []


def flush() -> None:
    """Write what has gathered: for whoever ends the process without Python's own end."""
    for lines in _open:
        lines.write()


def _add_time() -> structlog.typing.Processor:
    """The time of day in UTC (ISO 8601), whose date and seconds are made once for each second."""
    known_s, text = -1, ""

    def add_time(
        logger: object, method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        nonlocal known_s, text
        now_us = time.time_ns() // 1_000
        if now_us // 1_000_000 != known_s:
            known_s = now_us // 1_000_000
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(known_s))
        event["timestamp"] = f"{text}.{now_us % 1_000_000:06d}Z"
        return event

    return add_time


def configure(process: str, level: str) -> None:
    """Set up structlog for this process; ``process`` is bound to every line."""

    def add_process(
        logger: object, method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        event["process"] = process
        return event

    renderers: list[structlog.typing.Processor]
    logger_factory: Callable[..., object]
    if sys.stderr.isatty():
        console = structlog.dev.ConsoleRenderer(exception_formatter=_plain)
        renderers = [_made_printable, console]
        logger_factory = structlog.PrintLoggerFactory(sys.stderr)
    else:
        to_json = structlog.processors.JSONRenderer(serializer=orjson.dumps)
        renderers = [structlog.processors.ExceptionRenderer(_without_locals), to_json]
        lines = Lines(sys.stderr.buffer)
        atexit.register(lines.write)
        _open.append(lines)
        logger_factory = lambda *_: lines  # noqa: E731 - a def would declare it again
    structlog.configure(
        processors=[
            add_process,
            structlog.processors.add_log_level,
            _add_time(),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=logger_factory,
        cache_logger_on_first_use=True,
    )
