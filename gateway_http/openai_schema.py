"""OpenAI's request bodies, as far as we honour them, and the door that refuses the rest by name.

A parameter that is neither declared nor known to be harmless is refused, never ignored; null is
the same as absent. Types bound the depth of JSON, and msgspec refuses NaN and infinities.
"""

import re
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta

from gateway_http.generation_defaults import Temperature, TopK, TopP
from gateway_http.http_errors import UnsupportedParameterError, invalid

_SECONDS = Annotated[float, Meta(gt=0, le=604_800)]
_COUNT = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_TOKEN_ID = Annotated[int, Meta(ge=0, le=2**32 - 1)]
_MAX_PARAMETERS = 256

# Parameters that change nothing here: any value, or only the ones that ask for nothing.
_ANY = object()
_HARMLESS: dict[str, Any] = {
    "user": _ANY,
    "metadata": _ANY,
    "safety_identifier": _ANY,
    "prompt_cache_key": _ANY,
    "prompt_cache_retention": _ANY,
    "parallel_tool_calls": _ANY,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """``include_obfuscation`` pads events against traffic analysis: ours are never padded."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What chats and completions have in common. The last block is ours."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    n: _COUNT | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[_TOKEN_ID] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    max_tokens: _COUNT | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    session_id: Annotated[str, Meta(max_length=256)] | None = None
    priority: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    queue_timeout_s: _SECONDS | None = None
    execution_timeout_s: _SECONDS | None = None

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ContentPart(msgspec.Struct):
    """One part of a message; only text is taken."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a chat."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None


class ChatRequest(Common, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: _COUNT | None = None
    logprobs: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        """The logprob of each chosen token."""
        return bool(self.logprobs)


class CompletionRequest(Common, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions; a prompt is text, token ids, or a list of either."""

    prompt: str | list[str | _TOKEN_ID | list[_TOKEN_ID]]
    logprobs: bool | int | None = None

    @property
    def wants_logprobs(self) -> bool:
        """The logprob of each chosen token: 0 asks for it, as no alternatives are wanted."""
        return self.logprobs is not None and self.logprobs is not False

    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise invalid("The prompt is empty.", "prompt")
        kinds = set(map(type, self.prompt))
        if len(kinds) != 1:
            raise invalid("The prompt mixes texts and token ids.", "prompt")
        if kinds == {int}:
            return [cast(list[int], self.prompt)]
        return cast(list[str | list[int]], self.prompt)


RequestT = TypeVar("RequestT", bound=Common)


def decode(kind: type[RequestT], body: bytes) -> RequestT:
    """A checked body. Raises INVALID_REQUEST with the parameter's name."""
    try:
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        if len(raw) > _MAX_PARAMETERS:
            raise invalid("The body has too many parameters.")
        wanted = {
            name: value
            for name, value in raw.items()
            if not _is_dropped(name, value, kind.__struct_fields__)
        }
        if len(wanted) != len(raw):
            body = msgspec.json.encode(wanted)
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise invalid("The body is not valid JSON.") from None
    except RecursionError:
        raise invalid("The body's JSON is nested too deeply.") from None


def _is_dropped(name: str, value: msgspec.Raw, fields: tuple[str, ...]) -> bool:
    """Whether the parameter asks for nothing; refuses what is not known."""
    if name in fields:
        return False
    if bytes(value) == b"null":
        return True
    harmless = _HARMLESS.get(name, ())
    if harmless is _ANY:
        return True
    if name not in _HARMLESS:
        raise UnsupportedParameterError(name[:100])
    if msgspec.json.decode(value) not in harmless:
        raise UnsupportedParameterError(name, " with this value")
    return True


def _refusal(text: str) -> Exception:
    """msgspec's message in our words: "... - at `$.path`" or the name of a missing field."""
    message, _, path = text.partition(" - at `$")
    path = path.rstrip("`").removeprefix(".")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", message)
    unknown = re.fullmatch(r"Object contains unknown field `([^`]{1,100})`", message)
    if unknown:
        return UnsupportedParameterError(".".join(filter(None, (path, unknown[1]))))
    if missing:
        path = ".".join(filter(None, (path, missing[1])))
    return invalid(f"{message}: {path or 'body'}.", path or None)
