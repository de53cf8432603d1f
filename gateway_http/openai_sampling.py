"""From a body's parameters to the scheduler's: limits, defaults, grammars."""

from collections.abc import Sequence
from typing import Any

import msgspec

from gateway_http.client import LoadedModel
from gateway_http.http_errors import invalid
from gateway_http.openai_schema import (
    ResponseFormat,
    Sampling,
    StructuredOutputs,
)
from gateway_http.settings import GatewaySettings
from headway.v1 import generation_pb2


def check_most(field: str, value: int, limit: int) -> None:
    """Raises INVALID_REQUEST above the limit."""
    if value > limit:
        raise invalid(f"At most {limit} are allowed for {field}; this has {value}.", field)


def check_limits(body: Sampling, settings: GatewaySettings, has_tokenizer: bool) -> None:
    """What costs memory or time somewhere behind us. Raises INVALID_REQUEST."""
    check_most("stop", len(body.stop_strings), settings.max_stop_strings)
    check_most("stop_token_ids", len(body.stop_token_ids or ()), settings.max_stop_strings)
    check_most("logit_bias", len(body.logit_bias or ()), settings.max_logit_bias)
    for stop in body.stop_strings:
        if not 0 < len(stop) <= settings.max_stop_string_chars:
            limit = settings.max_stop_string_chars
            raise invalid(f"A stop string has 1 to {limit} characters.", "stop")
    if has_tokenizer:
        return
    if body.stop_strings:
        raise invalid("The model has no tokenizer: use stop_token_ids.", "stop")
    if (field := grammar_field(body)) != "tools":
        raise invalid("The model has no tokenizer, so no text of it fits anything.", field)


def sampling_params(
    body: Sampling,
    model: LoadedModel,
    *,
    max_tokens: int | None,
    logprobs: bool,
    num_top: int,
    grammar: generation_pb2.Grammar | None,
) -> generation_pb2.SamplingParams:
    """How to draw; what the body leaves out is as the model's makers want it."""
    defaults = model.defaults

    def chosen(name: str) -> Any:
        value = getattr(body, name)
        return value if value is not None else getattr(defaults, name)

    biases = (body.logit_bias or {}).items()
    if biases and max(token_id for token_id, _ in biases) >= model.card.vocab_size:
        raise invalid(f"Token ids must be below {model.card.vocab_size}.", "logit_bias")
    return generation_pb2.SamplingParams(
        max_tokens=max_tokens,
        temperature=chosen("temperature"),
        top_k=max(chosen("top_k") or 0, 0),
        top_p=chosen("top_p"),
        min_p=chosen("min_p") or 0.0,
        seed=None if body.seed is None else body.seed % 2**64,
        stop_token_ids=body.stop_token_ids or (),
        stop_strings=body.stop_strings,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        logprobs=logprobs,
        top_logprobs=num_top,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=chosen("repetition_penalty"),
        logit_bias=[
            generation_pb2.LogitBias(token_id=token_id, bias=bias) for token_id, bias in biases
        ],
        grammar=grammar,
    )


def grammar_of(body: Sampling, settings: GatewaySettings) -> generation_pb2.Grammar | None:
    """What the output has to fit. The executor compiles it, under limits of its own."""
    form, outputs = body.wanted_format, body.structured_outputs
    from_format = _of_format(form, settings, body.schema_field) if form else None
    from_outputs = _of_outputs(outputs, settings) if outputs else None
    if from_format is not None and from_outputs is not None:
        message = f"Give {body.format_field} or structured_outputs, not both."
        raise invalid(message, "structured_outputs")
    return from_format or from_outputs


def grammar_field(body: Sampling) -> str:
    """The parameter that a grammar comes from; if none of ours, tools made it."""
    if body.structured_outputs is not None and _names_given(body.structured_outputs):
        return "structured_outputs"
    form = body.wanted_format
    return body.format_field if form is not None and form.type != "text" else "tools"


def _of_format(
    form: ResponseFormat, settings: GatewaySettings, where: str
) -> generation_pb2.Grammar | None:
    if form.type == "text":
        return None
    if form.type == "json_object":
        return generation_pb2.Grammar(json_object=True)
    if form.json_schema is None:
        raise invalid("The schema is missing.", where)
    return schema_grammar(bytes(form.json_schema.schema), settings, f"{where}.schema")


def _of_outputs(
    outputs: StructuredOutputs, settings: GatewaySettings
) -> generation_pb2.Grammar | None:
    where = "structured_outputs"
    given = _names_given(outputs)
    if len(given) > 1:
        raise invalid(f"Give one of {', '.join(given)}.", where)
    if given == ["json"]:
        return schema_grammar(_schema_text(outputs.json), settings, f"{where}.json")
    if outputs.regex is not None:
        if not 0 < len(outputs.regex) <= settings.max_regex_chars:
            message = f"A regular expression has 1 to {settings.max_regex_chars} characters."
            raise invalid(message, f"{where}.regex")
        return generation_pb2.Grammar(regex=outputs.regex)
    if outputs.choice is not None:
        return _choice_grammar(outputs.choice, settings, f"{where}.choice")
    return generation_pb2.Grammar(json_object=True) if outputs.json_object else None


def _names_given(outputs: StructuredOutputs) -> list[str]:
    given = [name for name in ("json_object", "regex", "choice") if getattr(outputs, name)]
    return given if bytes(outputs.json) == b"null" else [*given, "json"]


def _schema_text(schema: msgspec.Raw) -> bytes:
    """A schema may be written as an object, or as a string that holds one."""
    text = bytes(schema)
    if text.startswith(b'"'):
        text = msgspec.json.decode(text, type=str).encode()
    return text


def _choice_grammar(
    texts: Sequence[str], settings: GatewaySettings, where: str
) -> generation_pb2.Grammar:
    if not texts or not all(texts):
        raise invalid("There must be a choice, and no empty one.", where)
    if len(set(texts)) < len(texts):
        raise invalid("No two choices may be alike.", where)
    check_most(where, sum(len(text.encode()) for text in texts), settings.max_grammar_bytes)
    return generation_pb2.Grammar(choice=generation_pb2.Choice(texts=texts))


def schema_grammar(text: bytes, settings: GatewaySettings, where: str) -> generation_pb2.Grammar:
    """A JSON Schema that is small, not deep, and refers to nothing but itself."""
    if len(text) > settings.max_grammar_bytes:
        message = f"A schema may have {settings.max_grammar_bytes} bytes; this has {len(text)}."
        raise invalid(message, where)
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise invalid("The schema is not valid JSON.", where) from None
    if not isinstance(schema, dict | bool):
        raise invalid("A JSON Schema is an object.", where)
    check_json(schema, settings, where)
    return generation_pb2.Grammar(json_schema=text.decode())


def check_json(root: object, settings: GatewaySettings, where: str) -> int:
    """Refuses what is nested deeply, has many values, or refers to anything outside of itself.

    Gives the number of values.
    """
    num_values = 0
    level = [root]
    for _ in range(settings.max_schema_levels):
        num_values += len(level)
        if num_values > settings.max_schema_values:
            raise invalid(f"This has more than {settings.max_schema_values} values.", where)
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                reference = value.get("$ref", "#")
                if isinstance(reference, str) and not reference.startswith("#"):
                    raise invalid("A $ref may only point into its own schema.", where)
                below += value.values()
            elif isinstance(value, list):
                below += value
        if not below:
            return num_values
        level = below
    raise invalid(f"This is nested more than {settings.max_schema_levels} levels deep.", where)
