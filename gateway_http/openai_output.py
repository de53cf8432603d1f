"""Tokens as OpenAI's answers: choices that grow, stream chunks, and whole bodies.

A chunk is a prebuilt prefix, the text, and a suffix: encoding the whole object for each token
would cost more than all the rest of the path.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from gateway_http.core.messages import Tokens
from gateway_http.detokenize import StopTrimmer
from gateway_http.text import Text
from headway.v1 import generation_pb2

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(slots=True)
class Delta:
    """What a choice gained: text that is certain, and the tokens behind it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """One sample on its way from tokens to text.

    The first ``num_skipped`` tokens were delivered on an earlier connection: they are read, for
    what follows depends on them, and not given out again.
    """

    def __init__(
        self, text: Text, request: generation_pb2.GenerationRequest, num_skipped: int = 0
    ) -> None:
        prompt = request.prompt_token_ids
        self._detokenizer = text.detokenizer(prompt) if text.has_tokenizer else None
        self._trimmer = StopTrimmer(request.sampling.stop_strings)
        self._num_skipped = num_skipped
        self._num_chars = 0
        self.num_tokens = 0

    def push(self, event: Tokens) -> Delta:
        """Take the next tokens."""
        delta = Delta()
        pieces: list[str] = []
        logprobs = event.logprobs or [math.nan] * len(event.token_ids)
        for token_id, logprob in zip(event.token_ids, logprobs, strict=True):
            text = self._detokenizer.push(token_id) if self._detokenizer is not None else ""
            sure = self._trimmer.push(text)
            if self.num_tokens >= self._num_skipped:
                pieces.append(sure)
                delta.token_ids.append(token_id)
                delta.logprobs.append(logprob)
                delta.text_offsets.append(self._num_chars)
            self._num_chars += len(text)
            self.num_tokens += 1
        delta.text = "".join(pieces)
        return delta

    def finish(self, end: generation_pb2.SequenceEnd) -> Delta:
        """The rest of the text and the reason."""
        rest = self._detokenizer.flush() if self._detokenizer is not None else ""
        stop_string = end.stop_string if end.HasField("stop_string") else None
        reason = _FINISH_REASONS.get(end.reason, "stop")
        return Delta(self._trimmer.finish(rest, stop_string), finish_reason=reason)


class Format(Protocol):
    """How one endpoint writes its answers."""

    wants_logprobs: bool
    wants_token_ids: bool

    def first(self, index: int) -> bytes:
        """The event that opens a choice, if there is one."""

    def chunk(self, index: int, delta: Delta) -> bytes:
        """A stream event with a delta."""

    def usage_chunk(self, usage: dict[str, int]) -> bytes:
        """The stream event with the usage, after all choices."""

    def body(self, deltas: Sequence[Delta], usage: dict[str, int]) -> bytes:
        """The whole answer of a request that is not streamed."""


class _Base:
    """What both formats share; ``kind`` is the object's name, ``id_prefix`` that of its id."""

    kind = ""
    chunk_kind = ""
    id_prefix = ""

    def __init__(
        self,
        request_id: str,
        model: str,
        text: Text,
        *,
        wants_logprobs: bool,
        wants_token_ids: bool,
    ) -> None:
        self.wants_logprobs = wants_logprobs
        self.wants_token_ids = wants_token_ids
        self._text = text
        self._head = {
            "id": self.id_prefix + request_id,
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }
        head = orjson.dumps({**self._head, "object": self.chunk_kind})
        self._prefix = b"data: " + head[:-1] + b',"choices":[{"index":'

    def usage_chunk(self, usage: dict[str, int]) -> bytes:
        head = {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage}
        return b"data: " + orjson.dumps(head) + b"\n\n"

    def body(self, deltas: Sequence[Delta], usage: dict[str, int]) -> bytes:
        choices = []
        for index, delta in enumerate(deltas):
            choice = {"index": index, **self._content(delta), "logprobs": self._logprobs(delta)}
            choice["finish_reason"] = delta.finish_reason
            if self.wants_token_ids:
                choice["token_ids"] = delta.token_ids
            choices.append(choice)
        return orjson.dumps({**self._head, "choices": choices, "usage": usage})

    def _suffix(self, delta: Delta) -> bytes:
        """The end of a stream event, after the text."""
        if not (self.wants_logprobs or self.wants_token_ids or delta.finish_reason):
            return b',"logprobs":null,"finish_reason":null}]}\n\n'
        rest: dict[str, Any] = {"logprobs": self._logprobs(delta)}
        rest["finish_reason"] = delta.finish_reason
        if self.wants_token_ids:
            rest["token_ids"] = delta.token_ids
        return b"," + orjson.dumps(rest)[1:] + b"]}\n\n"

    def _content(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        raise NotImplementedError

    def _token(self, token_id: int) -> str:
        if not self._text.has_tokenizer:
            return f"token_id:{token_id}"
        return self._text.token_text(token_id)


class ChatFormat(_Base):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def first(self, index: int) -> bytes:
        delta = b'{"role":"assistant","content":""}'
        return self._prefix + b'%d,"delta":%b%b' % (index, delta, self._suffix(Delta()))

    def chunk(self, index: int, delta: Delta) -> bytes:
        content = b'{"content":' + orjson.dumps(delta.text) + b"}" if delta.text else b"{}"
        return self._prefix + b'%d,"delta":%b%b' % (index, content, self._suffix(delta))

    def _content(self, delta: Delta) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": delta.text, "refusal": None}}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        content = []
        for token_id, logprob in zip(delta.token_ids, delta.logprobs, strict=True):
            token = self._token(token_id)
            is_whole = "\ufffd" not in token
            content.append(
                {
                    "token": token,
                    "logprob": logprob,
                    "bytes": list(token.encode()) if is_whole else None,
                    "top_logprobs": [],
                }
            )
        return {"content": content, "refusal": None}


class CompletionFormat(_Base):
    """/v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def first(self, index: int) -> bytes:
        return b""

    def chunk(self, index: int, delta: Delta) -> bytes:
        text = orjson.dumps(delta.text)
        return self._prefix + b'%d,"text":%b%b' % (index, text, self._suffix(delta))

    def _content(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        return {
            "tokens": [self._token(token_id) for token_id in delta.token_ids],
            "token_logprobs": delta.logprobs,
            "top_logprobs": None,
            "text_offset": delta.text_offsets,
        }
