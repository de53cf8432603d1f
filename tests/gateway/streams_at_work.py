"""Requests of the gateway's pure core, opened and accepted."""

from typing import Any

from gateway_http.core.frames import Frame
from gateway_http.core.messages import Stream
from gateway_http.core.streams import Streams

PLENTY = 1 << 30
MAX_RESUMES = 3


def connected() -> Streams:
    streams = Streams(MAX_RESUMES)
    streams.connected()
    return streams


def opened(streams: Streams, payload: str = "p", **options: Any) -> Stream:
    options = {"num_samples": 1, "num_bytes": 10, "on_change": lambda: None, **options}
    return streams.open(payload, **options)


def accepted(streams: Streams, **options: Any) -> Stream:
    stream = opened(streams, **options)
    streams.take(PLENTY)
    streams.on_accepted(stream.handle, f"id-{stream.key}", "waiting")
    stream.read()
    return stream


def frame(streams: Streams, handle: int, start: int, tokens: list[int]) -> None:
    indexes = range(start, start + len(tokens))
    streams.on_frame(Frame([handle] * len(tokens), list(indexes), tokens, [], []))


def end(streams: Streams, handle: int, num_tokens: int) -> None:
    streams.on_frame(Frame([], [], [], [], [(handle, num_tokens, "end")]))
