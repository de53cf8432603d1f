"""Tokens of many requests into the samples that they belong to.

Rule: each token is taken once, in order. One that is held already is compared; one that comes too
early means that something was lost. This is the hot path: no object for each token.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from gateway_http.core.messages import SampleEnded, Stream


class Alternatives(NamedTuple):
    """The likeliest tokens beside each entry of a frame: ``num_top`` for each, else flat."""

    num_top: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]


class Frame(NamedTuple):
    """Parallel arrays; ``ends`` holds (handle, num_tokens, detail). ``logprobs`` may be empty, and
    ``alternatives`` are there if any token has some."""

    handles: Sequence[int]
    indexes: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    ends: Iterable[tuple[int, int, Any]]
    alternatives: Alternatives | None = None


def take_frame(
    frame: Frame,
    samples: Mapping[int, tuple[Stream, int]],
    on_gap: Callable[[Stream], None],
    on_conflict: Callable[[Stream], None],
) -> Iterable[Stream]:
    """Gives the streams that have news.

    ``samples`` has whatever handles mean. Both callables are called at once, and see to it that
    nothing more of the stream is taken from this frame: by its handles, or by its samples' ends.
    """
    touched: dict[int, Stream] = {}
    if frame.alternatives is not None:
        _take_alternatives(frame, frame.alternatives, samples)
    logprobs: Iterable[float] = frame.logprobs or repeat(math.nan)
    for handle, index, token_id, logprob in zip(
        frame.handles, frame.indexes, frame.token_ids, logprobs, strict=False
    ):
        entry = samples.get(handle)
        if entry is None:
            continue
        stream, number = entry
        sample = stream.samples[number]
        if index == len(sample.token_ids) and sample.end is None:
            sample.token_ids.append(token_id)
            if stream.wants_logprobs:
                sample.logprobs.append(logprob)
            touched[stream.key] = stream
        elif index > len(sample.token_ids):
            on_gap(stream)
        elif index == len(sample.token_ids) or sample.token_ids[index] != token_id:
            on_conflict(stream)
    for handle, num_tokens, detail in frame.ends:
        entry = samples.get(handle)
        if entry is None:
            continue
        stream, number = entry
        sample = stream.samples[number]
        if num_tokens > len(sample.token_ids):
            on_gap(stream)
        elif num_tokens < len(sample.token_ids):
            on_conflict(stream)
        elif sample.end is None:
            sample.end = SampleEnded(number, detail)
            touched[stream.key] = stream
    return touched.values()


def _take_alternatives(
    frame: Frame, alternatives: Alternatives, samples: Mapping[int, tuple[Stream, int]]
) -> None:
    """File the alternatives of those entries that are about to be taken as tokens."""
    at = 0
    num_new: dict[int, int] = {}
    for handle, index, num_top in zip(
        frame.handles, frame.indexes, alternatives.num_top, strict=True
    ):
        start, at = at, at + num_top
        entry = samples.get(handle)
        if entry is None or not num_top:
            continue
        sample = entry[0].samples[entry[1]]
        new = num_new.get(handle, 0)
        if index == len(sample.token_ids) + new and sample.end is None:
            num_new[handle] = new + 1
            sample.num_top = num_top
            sample.top_token_ids += alternatives.token_ids[start:at]
            sample.top_logprobs += alternatives.logprobs[start:at]
