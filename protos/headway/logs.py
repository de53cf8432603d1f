"""Structured logs: an event is a constant ``noun.past_verb``, its values are keys.

Pretty on a terminal, JSON lines elsewhere. Never a prompt, a completion, a key or a header.
"""

import sys
from collections.abc import Callable

import orjson
import structlog

# Local variables hold prompts and keys; the defaults of both renderers would print them.
_plain = structlog.dev.plain_traceback
_without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


def configure(process: str, level: str) -> None:
    """Set up structlog for this process; ``process`` is bound to every line."""

    def add_process(
        logger: object, method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        event["process"] = process
        return event

    renderers: list[structlog.typing.Processor]
    if sys.stderr.isatty():
        renderers = [structlog.dev.ConsoleRenderer(exception_formatter=_plain)]
        logger_factory: Callable[..., object] = structlog.PrintLoggerFactory(sys.stderr)
    else:
        to_json = structlog.processors.JSONRenderer(serializer=orjson.dumps)
        renderers = [structlog.processors.ExceptionRenderer(_without_locals), to_json]
        logger_factory = structlog.BytesLoggerFactory(sys.stderr.buffer)
    structlog.configure(
        processors=[
            add_process,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=logger_factory,
        cache_logger_on_first_use=True,
    )
