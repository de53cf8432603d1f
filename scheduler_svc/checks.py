"""What a request may ask for. Nothing is changed here; each refusal names its field.

Comparisons with NaN are false, so each check of a number reads "is inside".
"""

import json
import operator
from collections.abc import Sequence

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2 as generation
from scheduler_svc.settings import SchedulerSettings

_MAX_TEMPERATURE = 100.0
_MAX_PENALTY = 2.0
_MAX_REPETITION_PENALTY = 100.0
_MAX_BIAS = 100.0
_MAX_GRAMMAR_DEPTH = 16
_MAX_RATE = 1e9  # of a quota: beyond it there is no limit that could be told from none


def bad(field: str, message: str) -> HeadwayError:
    """A refusal for good."""
    return HeadwayError(Reason.INVALID_REQUEST, f"{field}: {message}", field=field)


def too_long(prompt: int, max_tokens: int, card: generation.ModelCard) -> HeadwayError:
    """A refusal of what the model's context cannot hold."""
    return HeadwayError(
        Reason.PROMPT_TOO_LONG,
        f"prompt ({prompt}) and max_tokens ({max_tokens}) are together above the context "
        f"of {card.max_context_tokens} tokens",
        field="prompt_token_ids",
    )


def check_name(value: str, field: str, max_chars: int, *, may_be_empty: bool = False) -> None:
    """Names go into logs and keys: bounded and printable."""
    if not value and not may_be_empty:
        raise bad(field, "must not be empty")
    if len(value) > max_chars:
        raise bad(field, f"must not be longer than {max_chars} characters")
    if not value.isprintable():
        raise bad(field, "must be printable")


def check_names(body: generation.GenerationRequest, settings: SchedulerSettings) -> None:
    """Everything that names something."""
    most = settings.max_name_chars
    check_name(body.model, "model", most)
    check_name(body.tenant, "tenant", most, may_be_empty=True)
    check_name(body.session_id, "session_id", most, may_be_empty=True)
    check_name(body.idempotency_key, "idempotency_key", most, may_be_empty=True)
    check_name(body.group, "group", most, may_be_empty=True)
    if len(body.note) > settings.max_note_bytes:
        raise bad("note", f"must not be longer than {settings.max_note_bytes} bytes")


def check_prompt(body: generation.GenerationRequest, card: generation.ModelCard) -> None:
    """The prompt's tokens, without what is generated."""
    field = "prompt_token_ids"
    token_ids = body.prompt_token_ids[:]  # a list is faster to look through
    num_tokens = len(token_ids)
    if num_tokens == 0:
        raise bad(field, "must not be empty")
    if num_tokens >= card.max_context_tokens:
        raise too_long(num_tokens, 1, card)
    _check_vocabulary(token_ids, field, card)


def check_quota(quota: generation.Quota, settings: SchedulerSettings) -> None:
    """A key's limits, which somebody else vouches for."""
    check_name(quota.key_id, "quota.key_id", settings.max_name_chars, may_be_empty=True)
    if not 0 <= quota.requests_per_s <= _MAX_RATE:
        raise bad("quota.requests_per_s", f"must be from 0 to {_MAX_RATE:g}")


# --- sampling -------------------------------------------------------------------------------


def check_sampling(
    sampling: generation.SamplingParams, card: generation.ModelCard, settings: SchedulerSettings
) -> None:
    """How tokens are drawn; whether max_tokens fits is for the caller to see."""
    if sampling.HasField("max_tokens") and sampling.max_tokens == 0:
        raise bad("sampling.max_tokens", "must be at least 1")
    if sampling.HasField("temperature") and not 0 <= sampling.temperature <= _MAX_TEMPERATURE:
        raise bad("sampling.temperature", f"must be from 0 to {_MAX_TEMPERATURE:g}")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise bad("sampling.top_p", "must be above 0 and at most 1")
    if not 0 <= sampling.min_p <= 1:
        raise bad("sampling.min_p", "must be from 0 to 1")
    if sampling.stop_token_ids:
        _check_stop_token_ids(sampling.stop_token_ids, card, settings)
    if sampling.stop_strings:
        _check_stop_strings(sampling.stop_strings, settings)
    if sampling.top_logprobs:
        _check_top_logprobs(sampling.top_logprobs, "sampling.top_logprobs", card, settings)
        if not sampling.logprobs:
            raise bad("sampling.top_logprobs", "needs logprobs")
    _check_penalties(sampling)
    if sampling.logit_bias:
        _check_logit_bias(sampling.logit_bias, card, settings)
    if sampling.HasField("grammar"):
        _check_grammar(sampling.grammar, settings)


def _check_vocabulary(token_ids: Sequence[int], field: str, card: generation.ModelCard) -> None:
    if max(token_ids, default=0) >= card.vocab_size:
        raise bad(field, f"must be below the vocabulary's size, {card.vocab_size}")


def _check_stop_token_ids(
    token_ids: Sequence[int], card: generation.ModelCard, settings: SchedulerSettings
) -> None:
    if len(token_ids) > settings.max_stop_token_ids:
        raise bad("sampling.stop_token_ids", f"at most {settings.max_stop_token_ids}")
    _check_vocabulary(token_ids, "sampling.stop_token_ids", card)


def _check_stop_strings(stop_strings: Sequence[str], settings: SchedulerSettings) -> None:
    if len(stop_strings) > settings.max_stop_strings:
        raise bad("sampling.stop_strings", f"at most {settings.max_stop_strings}")
    if not all(stop_strings):
        raise bad("sampling.stop_strings", "must not be empty")
    most = settings.max_stop_string_bytes
    if any(len(stop.encode()) > most for stop in stop_strings):
        raise bad("sampling.stop_strings", f"must not be longer than {most} bytes")


def _check_top_logprobs(
    num_top: int, field: str, card: generation.ModelCard, settings: SchedulerSettings
) -> None:
    most = min(settings.max_top_logprobs, card.vocab_size)
    if num_top > most:
        raise bad(field, f"must not be above {most}")


def _check_penalties(sampling: generation.SamplingParams) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        if not -_MAX_PENALTY <= getattr(sampling, name) <= _MAX_PENALTY:
            raise bad(f"sampling.{name}", f"must be from {-_MAX_PENALTY:g} to {_MAX_PENALTY:g}")
    if sampling.HasField("repetition_penalty"):
        most = _MAX_REPETITION_PENALTY
        if not 0 < sampling.repetition_penalty <= most:
            raise bad("sampling.repetition_penalty", f"must be above 0 and at most {most:g}")


def _check_logit_bias(
    biases: Sequence[generation.LogitBias],
    card: generation.ModelCard,
    settings: SchedulerSettings,
) -> None:
    field = "sampling.logit_bias"
    if len(biases) > settings.max_logit_bias:
        raise bad(field, f"at most {settings.max_logit_bias} tokens")
    token_ids = [bias.token_id for bias in biases]
    _check_vocabulary(token_ids, field, card)
    if len(set(token_ids)) != len(token_ids):
        raise bad(field, "each token at most once")
    if not all(-_MAX_BIAS <= bias.bias <= _MAX_BIAS for bias in biases):
        raise bad(field, f"must be from {-_MAX_BIAS:g} to {_MAX_BIAS:g}")


def _check_grammar(root: generation.Grammar, settings: SchedulerSettings) -> None:
    """Its size and shape; whether a schema or an expression can be used the executor knows."""
    field = "sampling.grammar"
    if root.ByteSize() > settings.max_grammar_bytes:
        raise bad(field, f"must not be larger than {settings.max_grammar_bytes} bytes")
    level, num_nodes = [(field, root)], 0
    for _ in range(_MAX_GRAMMAR_DEPTH):
        num_nodes += len(level)
        if num_nodes > settings.max_grammar_parts:
            raise bad(field, f"must have at most {settings.max_grammar_parts} parts")
        level = [part for one in level for part in _check_node(*one, settings)]
        if not level:
            return
    raise bad(field, f"must not be nested deeper than {_MAX_GRAMMAR_DEPTH}")


def _check_node(
    field: str, grammar: generation.Grammar, settings: SchedulerSettings
) -> list[tuple[str, generation.Grammar]]:
    """One grammar, and what it is made of, to be checked as well."""
    kind = grammar.WhichOneof("kind")
    if kind is None:
        raise bad(field, "must have a kind")
    if kind in ("sequence", "any_of"):
        parts = grammar.sequence.grammars if kind == "sequence" else grammar.any_of.grammars
        if not parts:
            raise bad(f"{field}.{kind}", "must have parts")
        return [(f"{field}.{kind}[{number}]", part) for number, part in enumerate(parts)]
    if kind == "repetition":
        repetition = grammar.repetition
        if repetition.HasField("max") and repetition.max < max(1, repetition.min):
            raise bad(f"{field}.repetition.max", "must be at least 1, and no less than min")
        most = settings.max_grammar_parts
        if max(repetition.min, repetition.max) > most:
            raise bad(f"{field}.repetition", f"at most {most} times")
        return [(f"{field}.repetition.grammar", repetition.grammar)]
    if kind == "text_until" and not grammar.text_until:
        raise bad(f"{field}.text_until", "must not be empty")
    if kind == "json_object" and not grammar.json_object:
        raise bad(f"{field}.json_object", "must be true where it is set")
    if kind == "json_schema":
        _check_schema(grammar.json_schema, f"{field}.json_schema")
    elif kind == "regex":
        most = settings.max_regex_bytes
        if not 0 < len(grammar.regex.encode()) <= most:
            raise bad(f"{field}.regex", f"must have from 1 to {most} bytes")
    elif kind == "choice":
        _check_choice(grammar.choice.texts, f"{field}.choice", settings.max_choices)
    return []


def _check_schema(text: str, field: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise bad(field, "is no JSON") from None
    if not isinstance(schema, dict | bool):
        raise bad(field, "must be an object or a boolean")


def _check_choice(texts: Sequence[str], field: str, most: int) -> None:
    if not 0 < len(texts) <= most:
        raise bad(field, f"must have from 1 to {most} texts")
    if not all(texts):
        raise bad(field, "a text must not be empty")
    if len(set(texts)) != len(texts):
        raise bad(field, "no two texts may be alike")


# --- scores of the prompt -------------------------------------------------------------------


def check_scoring(
    body: generation.GenerationRequest, card: generation.ModelCard, settings: SchedulerSettings
) -> None:
    """What is asked about the prompt; its tokens were checked."""
    scoring = body.prompt_scoring
    _check_top_logprobs(scoring.top_logprobs, "prompt_scoring.top_logprobs", card, settings)
    most = settings.max_prompt_alternatives
    if scoring.num_alternatives > most:
        raise bad("prompt_scoring.num_alternatives", f"must not be above {most}")
    offsets, targets = scoring.target_offsets[:], scoring.target_token_ids[:]
    field = "prompt_scoring.target_offsets"
    if not offsets and not targets:
        return
    if len(offsets) != len(body.prompt_token_ids):
        raise bad(field, f"must be as many as the prompt has tokens, {len(body.prompt_token_ids)}")
    if offsets[0] != 0 or offsets[-1] != len(targets):
        raise bad(field, f"must go from 0 to the number of targets, {len(targets)}")
    if not all(map(operator.le, offsets, offsets[1:])):
        raise bad(field, "must not go down")
    _check_vocabulary(targets, "prompt_scoring.target_token_ids", card)
