"""One sample on its way from tokens to an answer: text, thoughts, tool calls.

``ReplySpec`` is all that this takes beside the tokens. It travels to the client and back, in a
header and not in an address, which would end in somebody's log, so that any gateway can continue a
stream.
"""

import base64
import binascii
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gateway_http.core.messages import Tokens
from gateway_http.detokenize import MAX_CHARACTER_TOKENS, StopTrimmer
from gateway_http.http_errors import invalid
from gateway_http.model_text import Text
from gateway_http.openai_place import MAX_CHOICES
from gateway_http.reply import SHOWN_TOKENS, Piece, ReplyFormat, ReplyParser
from headway.v1 import generation_pb2

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}
Kind = Literal["chat", "completion", "response"]

_MAX_SPEC_CHARS = 32_768
_TOKENS_AT_ONCE = 64  # with twenty alternatives each some 5 ms of work
_Tail = Annotated[
    list[Annotated[int, Meta(ge=0, le=2**32 - 1)]], Meta(max_length=MAX_CHARACTER_TOKENS)
]
_NO_PIECES: list[Piece] = []


class ReplySpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request, or of one for each of several prompts, are told.

    ``prompt_tails``: each prompt's last tokens, which an answer's first space may depend on.
    ``others`` are the requests of all prompts but the first. ``num_echo_chars``: the length of each
    prompt, where prompts are echoed. ``num_hidden``: so many tokens of each sample are generated
    only because at least one must be. ``has_call_reason``: a reply that calls tools ends with
    "tool_calls". ``said`` is what a response says of its request, as a JSON object.
    """

    kind: Kind
    model: Annotated[str, Meta(min_length=1, max_length=512)]
    created: int
    num_samples: Annotated[int, Meta(ge=1, le=65_536)] = 1
    prompt_tails: Annotated[list[_Tail], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: [[]]
    )
    others: list[str] = []
    num_echo_chars: list[Annotated[int, Meta(ge=0)]] = []
    num_hidden: Annotated[int, Meta(ge=0, le=1)] = 0
    stop_strings: list[str] = []
    wants_logprobs: bool = False
    wants_token_ids: bool = False
    has_usage_chunk: bool = False
    has_timing: bool = False
    form: ReplyFormat = ReplyFormat()
    has_reasoning: bool = True
    has_call_reason: bool = True
    said: str = ""

    @property
    def num_choices(self) -> int:
        """Samples of all prompts."""
        return len(self.prompt_tails) * self.num_samples

    @property
    def num_places(self) -> int:
        """Counts in the id of an event."""
        return 1 if self.kind == "response" else self.num_choices

    def encode(self) -> str:
        """As a header's value."""
        return base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")


def decode_spec(text: str, field: str) -> ReplySpec:
    """Whatever a client sends back. Raises INVALID_REQUEST."""
    try:
        if len(text) > _MAX_SPEC_CHARS:
            raise ValueError
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        spec = msgspec.msgpack.decode(data, type=ReplySpec)
        msgspec.json.decode(spec.said or "{}", type=dict[str, msgspec.Raw])
    except (binascii.Error, ValueError, msgspec.MsgspecError, RecursionError):
        raise invalid("This is not the state of a stream.", field) from None
    num_prompts = len(spec.prompt_tails)
    is_sound = (
        all(spec.stop_strings)
        and all(spec.others)
        and len(spec.others) + 1 == num_prompts
        and len(spec.num_echo_chars) in (0, num_prompts)
        and spec.num_choices <= MAX_CHOICES
    )
    if not is_sound:
        raise invalid("This is not the state of a stream.", field)
    return spec


@dataclass(slots=True)
class Delta:
    """What a choice gained: text that is certain, and the tokens behind it.

    ``pieces`` says what the text is, where a reply has more than content; ``text`` is empty then.
    """

    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def behind(self, num_seen: int) -> "Delta":
        """Without its first tokens; the text is without theirs already."""
        num_top = len(self.top_token_ids) // len(self.token_ids)
        return Delta(
            self.text,
            self.pieces,
            self.token_ids[num_seen:],
            self.logprobs[num_seen:],
            self.top_token_ids[num_seen * num_top :],
            self.top_logprobs[num_seen * num_top :],
            self.text_offsets[num_seen:],
        )

    def parts(self) -> Iterator["Delta"]:
        """Its tokens, some at a time, without the text; one without a logprob has no
        alternatives."""
        num_rows = _num_known(self.logprobs)
        num_top = len(self.top_token_ids) // num_rows if num_rows else 0
        at = 0
        for start in range(0, len(self.token_ids), _TOKENS_AT_ONCE):
            some = slice(start, start + _TOKENS_AT_ONCE)
            logprobs = self.logprobs[some]
            row = slice(at, at + num_top * _num_known(logprobs))
            at = row.stop
            yield Delta(
                token_ids=self.token_ids[some],
                logprobs=logprobs,
                top_token_ids=self.top_token_ids[row],
                top_logprobs=self.top_logprobs[row],
                text_offsets=self.text_offsets[some],
            )

    def extend(self, more: "Delta") -> None:
        """Add what came next."""
        self.text += more.text
        self.pieces += more.pieces
        self.token_ids += more.token_ids
        self.logprobs += more.logprobs
        self.top_token_ids += more.top_token_ids
        self.top_logprobs += more.top_logprobs
        self.text_offsets += more.text_offsets
        self.finish_reason = more.finish_reason


def _num_known(logprobs: Sequence[float]) -> int:
    return sum(not math.isnan(logprob) for logprob in logprobs)


class Choice:
    """One sample of prompt ``number``.

    The first ``num_skipped`` tokens were delivered on an earlier connection: they are read, for
    what follows depends on them, and not given out again.
    """

    def __init__(self, spec: ReplySpec, text: Text, number: int = 0, num_skipped: int = 0) -> None:
        self._spec = spec
        shown = () if spec.form.is_plain else SHOWN_TOKENS
        self._detokenizer = None
        if text.has_tokenizer:
            self._detokenizer = text.detokenizer(spec.prompt_tails[number], shown)
        self._trimmer = StopTrimmer(spec.stop_strings)
        self._parser = None if spec.form.is_plain else ReplyParser(spec.form)
        self._num_skipped = num_skipped
        self._num_chars = spec.num_echo_chars[number] if spec.num_echo_chars else 0
        self.num_tokens = 0
        self.num_reasoning_tokens = 0

    def push(self, event: Tokens) -> Delta:
        """Take the next tokens."""
        num_tokens = len(event.token_ids)
        start = max(0, self._num_skipped - self.num_tokens)  # what comes before it was seen
        self.num_tokens += num_tokens
        texts: list[str] = []
        pieces: list[Piece] = [] if self._parser is not None else _NO_PIECES
        offsets: list[int] = []
        for number, token_id in enumerate(event.token_ids):
            if self._spec.wants_logprobs:
                offsets.append(self._num_chars)
            text = self._detokenizer.push(token_id) if self._detokenizer is not None else ""
            self._num_chars += len(text)
            sure = self._trimmer.push(text)
            if self._parser is not None:
                new_pieces = self._parser.push(sure) if sure else _NO_PIECES
                self.num_reasoning_tokens += self._parser.is_thinking
                if number >= start:
                    pieces += new_pieces
            elif number >= start:
                texts.append(sure)
        logprobs = event.logprobs or [math.nan] * num_tokens
        delta = Delta(
            "".join(texts),
            pieces,
            event.token_ids,
            logprobs,
            event.top_token_ids,
            event.top_logprobs,
            offsets,
        )
        return delta if start == 0 else delta.behind(start)

    def finish(self, end: generation_pb2.SequenceEnd) -> Delta:
        """The rest of the text and the reason."""
        rest = self._detokenizer.flush() if self._detokenizer is not None else ""
        stop_string = end.stop_string if end.HasField("stop_string") else None
        reason = _FINISH_REASONS.get(end.reason, "stop")
        text = self._trimmer.finish(rest, stop_string)
        if self._parser is None:
            return Delta(text, finish_reason=reason)
        pieces = self._parser.push(text) + self._parser.finish()
        if self._parser.num_calls and reason == "stop" and self._spec.has_call_reason:
            reason = "tool_calls"
        return Delta(pieces=pieces, finish_reason=reason)


def tail_of(prompt: Sequence[int]) -> list[int]:
    """What of a prompt matters to the text that follows it."""
    return list(prompt[-MAX_CHARACTER_TOKENS:])
