"""OpenAI's request bodies, as far as we honour them, and the door that refuses the rest by name.

A parameter that is neither declared nor known to be harmless is refused, never ignored; null is
the same as absent. Types bound the depth of JSON, and msgspec refuses NaN and infinities.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import msgspec
from msgspec import Meta

from gateway_http.generation_defaults import (
    MinP,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)
from gateway_http.http_errors import UnsupportedParameterError, invalid
from gateway_http.json_errors import wrong_body
from gateway_http.json_keys import check_keys
from gateway_http.json_nulls import without_nulls

SECONDS = Annotated[float, Meta(gt=0, le=604_800)]
COUNT = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TOKEN_ID = Annotated[int, Meta(ge=0, le=2**32 - 1)]
_PENALTY = Annotated[float, Meta(ge=-2, le=2)]
_BIAS = Annotated[float, Meta(ge=-100, le=100)]
_MAX_PARAMETERS = 256

# Parameters that change nothing here: any value, or only the ones that ask for nothing.
ANY = object()
HARMLESS: dict[str, Any] = {
    "user": ANY,
    "metadata": ANY,
    "safety_identifier": ANY,
    "prompt_cache_key": ANY,
    "prompt_cache_retention": ANY,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}
_HINTS = {
    "guided_json": ": use structured_outputs.json",
    "guided_regex": ": use structured_outputs.regex",
    "guided_choice": ": use structured_outputs.choice",
    "chat_template": ": templates come with the model",
    "functions": ": use tools",
    "function_call": ": use tool_choice",
}


def raw_default(text: bytes) -> Any:
    """A field's default; a factory, because a JSON Schema cannot show a Raw."""
    return msgspec.field(default_factory=lambda: msgspec.Raw(text))


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """``include_obfuscation`` pads events against traffic analysis: ours are never padded."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The schema of a response_format; it always holds, as if strict."""

    name: str = ""
    schema: msgspec.Raw = raw_default(b"{}")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """What a reply has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's way to say what an output has to fit: one of these."""

    json: msgspec.Raw = raw_default(b"null")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


class Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all endpoints have in common. The last block is ours."""

    harmless: ClassVar[dict[str, Any]] = HARMLESS
    format_field: ClassVar[str] = "response_format"
    schema_field: ClassVar[str] = "response_format.json_schema"

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: _PENALTY | None = None
    frequency_penalty: _PENALTY | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: dict[TOKEN_ID, _BIAS] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TOKEN_ID] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    session_id: Annotated[str, Meta(max_length=256)] | None = None
    priority: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    queue_timeout_s: SECONDS | None = None
    execution_timeout_s: SECONDS | None = None
    include_timing: bool | None = None

    @property
    def wanted_format(self) -> ResponseFormat | None:
        """What the endpoint's own parameter, ``format_field``, says that an answer has to be."""
        raise NotImplementedError

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Common(Sampling, forbid_unknown_fields=True, kw_only=True):
    """What chats and completions have in common."""

    n: COUNT | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def wanted_format(self) -> ResponseFormat | None:
        return self.response_format

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(Common, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions; a prompt is text, token ids, or a list of either."""

    prompt: str | list[str | TOKEN_ID | list[TOKEN_ID]]
    logprobs: bool | Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        """The logprob of each chosen token: 0 asks for it, too, without alternatives."""
        return self.logprobs is not None and self.logprobs is not False

    @property
    def num_top(self) -> int:
        """Alternatives of each token."""
        return int(self.logprobs) if self.logprobs and self.logprobs is not True else 0

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


RequestT = TypeVar("RequestT", bound=msgspec.Struct)
_parameters = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode(kind: type[RequestT], body: bytes) -> RequestT:
    """A checked body. Raises INVALID_REQUEST with the parameter's name."""
    try:
        raw = _parameters.decode(body)
        check_keys(body)
        if len(raw) > _MAX_PARAMETERS:
            raise invalid("The body has too many parameters.")
        if others := [name for name in raw if name not in _names(kind)]:
            harmless: dict[str, Any] = getattr(kind, "harmless", {})
            for name in others:
                _check_harmless(name, raw.pop(name), harmless)
            body = msgspec.json.encode(raw)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError:
            if b"null" not in body:
                raise
        return msgspec.json.decode(without_nulls(body, kind), type=kind)
    except (ValueError, RecursionError) as error:
        raise wrong_body(error, body) from None


@cache
def _names(kind: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(kind.__struct_fields__)


def _check_harmless(name: str, value: msgspec.Raw, harmless: Mapping[str, Any]) -> None:
    """Refuses a parameter that is not declared, unless it asks for nothing."""
    values = harmless.get(name, ())
    if bytes(value) == b"null" or values is ANY:
        return
    hint = _HINTS.get(name)
    if name not in harmless:
        raise UnsupportedParameterError(name[:100], hint or "")
    if msgspec.json.decode(value) not in values:
        raise UnsupportedParameterError(name, hint or " with this value")
