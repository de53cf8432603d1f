"""Deltas as items of a response, and as the events in which they come.

Items open and close in the order of the reply: thoughts, messages, calls. A body is what the events
of the same reply add up to.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway_http.model_text import Text
from gateway_http.openai_choice import Delta, ReplySpec
from gateway_http.openai_logprobs import chat_logprobs
from gateway_http.openai_output import call_id
from gateway_http.openai_place import Place
from gateway_http.openai_usage import Outcome
from gateway_http.reply import Piece, Thought
from gateway_http.tool_call_json import CallArguments, CallStart, Content
from headway.errors import HeadwayError

_ERROR_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


class ResponsesFormat:
    """One response. The id of an event is its ``sequence_number``."""

    counts_events = True

    def __init__(self, request_id: str, spec: ReplySpec, text: Text) -> None:
        self._request_id = request_id
        self._spec = spec
        self._text = text
        self._said = msgspec.json.decode(spec.said or "{}", type=dict[str, msgspec.Raw])
        self._num_events = 0
        self._num_seen = 0
        self._items: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is not out yet
        self._is_incomplete = False
        self._num_calls = 0
        self._has_open_item = False

    def opening(self, place: Place | None) -> bytes:
        if place is not None:
            self._num_seen = place.counts[0] + 1
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def chunk(self, index: int, delta: Delta) -> bytes:
        pieces: list[Piece] = list(delta.pieces)
        if delta.text:
            pieces.append(Content(delta.text))
        self._add_logprobs(delta, delta)
        data = b"".join(self._piece(piece) for piece in pieces)
        if delta.finish_reason is not None:
            self._is_incomplete = delta.finish_reason == "length"
            data += self._close("incomplete" if self._is_incomplete else "completed")
            if not self._items:  # an answer without a word is a message all the same
                data += self._open_message() + self._close("completed")
        return data

    def _add_logprobs(self, part: Delta, whole: Delta) -> None:
        """Of a part's tokens, where the whole tells content."""
        is_plain = self._spec.form.is_plain
        has_content = any(isinstance(piece, Content) for piece in whole.pieces)
        if self._spec.wants_logprobs and (is_plain or has_content):
            tops = (part.top_token_ids, part.top_logprobs)
            self._logprobs += chat_logprobs(self._text, part.token_ids, part.logprobs, *tops)

    def closing(self, outcome: Outcome) -> bytes:
        kind = "incomplete" if self._is_incomplete else "completed"
        return self._event(f"response.{kind}", response=self._response(kind, outcome))

    def failure(self, error: HeadwayError) -> bytes:
        data = self._close("incomplete")
        response = self._response("failed")
        code = _ERROR_CODES.get(error.row.http_status, "server_error")
        response["error"] = {"code": code, "message": error.message}
        return data + self._event("response.failed", response=response)

    async def body(self, deltas: Sequence[Delta], outcome: Outcome) -> bytes:
        (delta,) = deltas
        for part in delta.parts():
            await asyncio.sleep(0)
            self._add_logprobs(part, delta)
        self.chunk(0, Delta(delta.text, delta.pieces, finish_reason=delta.finish_reason))
        kind = "incomplete" if self._is_incomplete else "completed"
        return msgspec.json.encode(self._response(kind, outcome))

    # --- items ---

    def _piece(self, piece: Piece) -> bytes:
        match piece:
            case Thought():
                data = self._enter("reasoning", self._open_thought)
                return data + self._add_text("response.reasoning_text.delta", piece.text)
            case Content():
                data = self._enter("message", self._open_message)
                item = self._items[-1]
                told, self._logprobs = self._logprobs, []
                item["content"][0]["logprobs"] += told
                kind = "response.output_text.delta"
                return data + self._add_text(kind, piece.text, logprobs=told)
            case CallStart():
                return self._close("completed") + self._open_call(piece)
            case CallArguments():
                self._items[-1]["arguments"] += piece.text
                kind = "response.function_call_arguments.delta"
                return self._item_event(kind, delta=piece.text)

    def _enter(self, kind: str, open_item: Any) -> bytes:
        if self._has_open_item and self._items[-1]["type"] == kind:
            return b""
        data: bytes = self._close("completed") + open_item()
        return data

    def _add_text(self, kind: str, text: str, **more: Any) -> bytes:
        self._items[-1]["content"][0]["text"] += text
        return self._item_event(kind, content_index=0, delta=text, **more)

    def _open_thought(self) -> bytes:
        item = {"type": "reasoning", "summary": [], "content": []}
        return self._open("rs", item, {"type": "reasoning_text", "text": ""})

    def _open_message(self) -> bytes:
        item = {"type": "message", "role": "assistant", "content": []}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return self._open("msg", item, part)

    def _open_call(self, piece: CallStart) -> bytes:
        own_id = call_id(self._request_id, 0, piece.index)
        item = {"type": "function_call", "call_id": own_id, "name": piece.name, "arguments": ""}
        return self._open("fc", item, None)

    def _open(self, prefix: str, item: dict[str, Any], part: dict[str, Any] | None) -> bytes:
        item["id"] = f"{prefix}_{self._request_id}_{len(self._items)}"
        item["status"] = "in_progress"
        self._items.append(item)
        self._has_open_item = True
        place = len(self._items) - 1
        data = self._event("response.output_item.added", output_index=place, item=item)
        if part is not None:
            kind = "response.content_part.added"
            data += self._item_event(kind, content_index=0, part=part)
            item["content"].append(part)
        return data

    def _close(self, status: str) -> bytes:
        if not self._has_open_item:
            return b""
        self._has_open_item = False
        item = self._items[-1]
        item["status"] = status
        data = self._done(item)
        place = len(self._items) - 1
        return data + self._event("response.output_item.done", output_index=place, item=item)

    def _done(self, item: dict[str, Any]) -> bytes:
        if item["type"] == "function_call":
            kind = "response.function_call_arguments.done"
            return self._item_event(kind, name=item["name"], arguments=item["arguments"])
        part = item["content"][0]
        if item["type"] == "reasoning":
            data = self._item_event(
                "response.reasoning_text.done", content_index=0, text=part["text"]
            )
        else:
            data = self._item_event(
                "response.output_text.done",
                content_index=0,
                text=part["text"],
                logprobs=part["logprobs"],
            )
        return data + self._item_event("response.content_part.done", content_index=0, part=part)

    # --- events ---

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        place = len(self._items) - 1
        return self._event(kind, item_id=self._items[place]["id"], output_index=place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        if number < self._num_seen:
            return b""
        data = msgspec.json.encode({"type": kind, "sequence_number": number, **fields})
        event_id = f"{self._request_id}:{number}"
        return b"id: %b\nevent: %b\ndata: %b\n\n" % (event_id.encode(), kind.encode(), data)

    def _response(self, status: str, outcome: Outcome | None = None) -> dict[str, Any]:
        response = {
            "id": f"resp_{self._request_id}",
            "object": "response",
            "created_at": self._spec.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._spec.model,
            "output": self._items,
            **self._said,
            "usage": _usage(outcome) if outcome is not None else None,
        }
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if outcome is not None and self._spec.has_timing:
            response["timing"] = outcome.timing()
        return response


def _usage(outcome: Outcome) -> dict[str, Any]:
    return {
        "input_tokens": outcome.num_prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": outcome.num_cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": outcome.num_generated_tokens,
        "output_tokens_details": {"reasoning_tokens": outcome.num_reasoning_tokens},
        "total_tokens": outcome.num_prompt_tokens + outcome.num_generated_tokens,
    }
