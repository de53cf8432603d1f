"""Deltas as OpenAI's answers: stream chunks and whole bodies, of chats and completions.

A chunk is a prebuilt prefix, the text, and a suffix: encoding the whole object for each token
would cost more than all the rest of the path.
"""

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import orjson

from gateway_http.http_errors import openai_error
from gateway_http.model_text import Text
from gateway_http.openai_choice import Delta, ReplySpec
from gateway_http.openai_logprobs import chat_logprobs, completion_logprobs
from gateway_http.openai_place import Place
from gateway_http.openai_usage import Outcome
from gateway_http.reply import Piece, Thought
from gateway_http.tool_call_json import CallStart, Content
from headway.errors import HeadwayError

_DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Echo:
    """A prompt that is to be told before its completion, with what the model thought of it."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)

    def as_delta(self) -> Delta:
        """As if it had been generated."""
        return Delta(
            self.text,
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs),
            top_token_ids=list(self.top_token_ids),
            top_logprobs=list(self.top_logprobs),
            text_offsets=list(self.text_offsets),
        )


class Format(Protocol):
    """How one endpoint writes its answers; events are whole SSE events, any number of them.

    ``counts_events``: each event has a number, and writes it as its id. Which events those are must
    then depend on the tokens alone, so that these are to be told one by one.
    """

    counts_events: bool

    def opening(self, place: Place | None) -> bytes:
        """Events before all others, for a reader who begins, or has come to ``place``."""

    def chunk(self, index: int, delta: Delta) -> bytes:
        """Events with a delta of one choice, or none if it tells nothing."""

    def closing(self, outcome: Outcome) -> bytes:
        """Events after all choices have ended."""

    def failure(self, error: HeadwayError) -> bytes:
        """Events that say that nothing more comes."""

    async def body(self, deltas: Sequence[Delta], outcome: Outcome) -> bytes:
        """The whole answer of a request that is not streamed; others have their turns meanwhile."""


class _Base:
    """What both formats share; ``kind`` is the object's name, ``id_prefix`` that of its id."""

    kind = ""
    chunk_kind = ""
    id_prefix = ""
    counts_events = False

    def __init__(self, request_id: str, spec: ReplySpec, text: Text) -> None:
        self._request_id = request_id
        self._spec = spec
        self._text = text
        self._head = {
            "id": self.id_prefix + request_id,
            "object": self.kind,
            "created": spec.created,
            "model": spec.model,
        }
        self._is_bare = not (spec.wants_logprobs or spec.wants_token_ids)
        # A stream that ends with its usage says in every event before that it is not there yet.
        self._tail = b"]%b}\n\n" % (b',"usage":null' if spec.has_usage_chunk else b"")
        self._bare_suffix = b',"logprobs":null,"finish_reason":null}' + self._tail

    @cached_property
    def _prefix(self) -> bytes:
        head = orjson.dumps({**self._head, "object": self.chunk_kind})
        return b"data: " + head[:-1] + b',"choices":[{"index":'

    def opening(self, place: Place | None) -> bytes:
        return b""

    def chunk(self, index: int, delta: Delta) -> bytes:
        is_silent = not (delta.text or delta.pieces or delta.finish_reason)
        if is_silent and (self._is_bare or not delta.token_ids):
            return b""
        return self._prefix + b"%d,%b%b" % (index, self._delta(index, delta), self._suffix(delta))

    def closing(self, outcome: Outcome) -> bytes:
        """A chunk without choices for usage and timing, where they were asked for."""
        extra: dict[str, Any] = {}
        if self._spec.has_usage_chunk:
            extra["usage"] = outcome.usage()
        if self._spec.has_timing:
            extra["timing"] = outcome.timing()
        if not extra:
            return _DONE
        last = {**self._head, "object": self.chunk_kind, "choices": [], **extra}
        return b"data: " + orjson.dumps(last) + b"\n\n" + _DONE

    def failure(self, error: HeadwayError) -> bytes:
        return b"data: " + orjson.dumps(openai_error(error)) + b"\n\n"

    async def body(self, deltas: Sequence[Delta], outcome: Outcome) -> bytes:
        choices = []
        for index, delta in enumerate(deltas):
            choice = {"index": index, **self._content(index, delta)}
            choice["logprobs"] = await self._all_logprobs(delta)
            choice["finish_reason"] = delta.finish_reason
            if self._spec.wants_token_ids:
                choice["token_ids"] = delta.token_ids
            choices.append(choice)
        body: dict[str, Any] = {**self._head, "choices": choices, "usage": outcome.usage()}
        if self._spec.has_timing:
            body["timing"] = outcome.timing()
        return orjson.dumps(body)

    async def _all_logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """Those of a whole answer take seconds, so its lists are encoded part by part."""
        found = self._logprobs(Delta())
        if found is None:
            return None
        lists: defaultdict[str, list[bytes]] = defaultdict(list)
        for part in delta.parts():
            await asyncio.sleep(0)
            for name, values in (self._logprobs(part) or {}).items():
                if values:
                    lists[name].append(orjson.dumps(values)[1:-1])
        whole = {name: orjson.Fragment(b"[%b]" % b",".join(some)) for name, some in lists.items()}
        return found | whole

    def _suffix(self, delta: Delta) -> bytes:
        """The end of a stream event, after the text."""
        if self._is_bare and not delta.finish_reason:
            return self._bare_suffix
        rest: dict[str, Any] = {"logprobs": self._logprobs(delta)}
        rest["finish_reason"] = delta.finish_reason
        if self._spec.wants_token_ids:
            rest["token_ids"] = delta.token_ids
        return b"," + orjson.dumps(rest)[1:] + self._tail

    def _delta(self, index: int, delta: Delta) -> bytes:
        raise NotImplementedError

    def _content(self, index: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatFormat(_Base):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def opening(self, place: Place | None) -> bytes:
        if place is not None:
            return b""
        start = b'"delta":{"role":"assistant","content":""}'
        suffix = self._suffix(Delta())
        numbers = range(self._spec.num_samples)
        return b"".join(self._prefix + b"%d,%b%b" % (one, start, suffix) for one in numbers)

    def chunk(self, index: int, delta: Delta) -> bytes:
        if not self._spec.has_reasoning:
            delta.pieces = [one for one in delta.pieces if not isinstance(one, Thought)]
        return super().chunk(index, delta)

    def _delta(self, index: int, delta: Delta) -> bytes:
        if delta.pieces:
            return b'"delta":' + orjson.dumps(self._merged(index, delta.pieces))
        if delta.text:
            return b'"delta":{"content":' + orjson.dumps(delta.text) + b"}"
        return b'"delta":{}'

    def _merged(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """One delta for all pieces; clients add up each of its fields by itself."""
        delta: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            if isinstance(piece, Thought):
                if self._spec.has_reasoning:
                    whole = delta.get("reasoning_content", "") + piece.text
                    delta["reasoning_content"] = whole
            elif isinstance(piece, Content):
                delta["content"] = delta.get("content", "") + piece.text
            elif isinstance(piece, CallStart):
                call = self._call(index, piece)
                calls[piece.index] = {"index": piece.index, **call}
            else:
                more = calls.setdefault(piece.index, _more_arguments(piece.index))
                more["function"]["arguments"] += piece.text
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def _call(self, index: int, piece: CallStart) -> dict[str, Any]:
        return {
            "id": call_id(self._request_id, index, piece.index),
            "type": "function",
            "function": {"name": piece.name, "arguments": ""},
        }

    def _content(self, index: int, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.pieces or not self._spec.form.is_plain:
            message.update(self._message(index, delta.pieces))
        return {"message": message}

    def _message(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        whole = self._merged(index, pieces)
        message: dict[str, Any] = {"content": whole.get("content")}
        if "reasoning_content" in whole:
            message["reasoning_content"] = whole["reasoning_content"]
        if "tool_calls" in whole:
            calls = [{**call} for call in whole["tool_calls"]]
            for call in calls:
                del call["index"]
            message["tool_calls"] = calls
        elif message["content"] is None:
            message["content"] = ""
        return message

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._spec.wants_logprobs:
            return None
        tops = (delta.top_token_ids, delta.top_logprobs)
        content = chat_logprobs(self._text, delta.token_ids, delta.logprobs, *tops)
        return {"content": content, "refusal": None}


class CompletionFormat(_Base):
    """/v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def _delta(self, index: int, delta: Delta) -> bytes:
        return b'"text":' + orjson.dumps(delta.text)

    def _content(self, index: int, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._spec.wants_logprobs:
            return None
        tops = (delta.top_token_ids, delta.top_logprobs)
        return completion_logprobs(
            self._text, delta.token_ids, delta.logprobs, *tops, delta.text_offsets
        )


def call_id(request_id: str, choice: int, number: int) -> str:
    """The same for the same call, at every gateway and after every resumption."""
    digest = hashlib.sha256(f"{request_id}/{choice}/{number}".encode()).hexdigest()
    return f"call_{digest[:24]}"


def _more_arguments(index: int) -> dict[str, Any]:
    return {"index": index, "function": {"arguments": ""}}
