"""What Tinker clients send: their JSON bodies, checked, and as the scheduler's request.

Unknown fields are ignored, because SDKs grow; a known field of a wrong type is refused by name.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from gateway_http.http_errors import invalid
from gateway_http.json_errors import wrong_body
from gateway_http.json_keys import check_keys
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_scoring import TargetTensor, set_targets
from headway.v1 import generation_pb2

_MAX_INT32 = 2**31 - 1
_MAX_ECHO = 64

Name = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=_MAX_INT32)]
Count = Annotated[int, Meta(ge=0, le=_MAX_INT32)]
AtLeastOne = Annotated[int, Meta(ge=1, le=_MAX_INT32)]
# counts up from multiples of 10**9, so it passes 2**53
SeqId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
StopString = Annotated[str, Meta(min_length=1)]


class CreateSamplingSession(msgspec.Struct, frozen=True):
    """Body of create_sampling_session."""

    session_id: Name
    sampling_session_seq_id: SeqId
    base_model: Name | None = None
    model_path: Name | None = None


class Chunk(msgspec.Struct, frozen=True):
    """A piece of a prompt; other types than encoded_text have fields of their own."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["encoded_text"]})] = "encoded_text"
    tokens: list[TokenId] | None = None


class Prompt(msgspec.Struct, frozen=True):
    """A prompt in pieces."""

    chunks: list[Chunk]


class SamplingParams(msgspec.Struct, frozen=True):
    """How to draw; top_k -1 is off, and ``stop`` absent, [], texts or ids mean four things."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=_MAX_INT32)] = -1
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    max_tokens: AtLeastOne | None = None
    seed: int | None = None
    stop: StopString | list[StopString | TokenId] | None = None


class Sample(msgspec.Struct, frozen=True):
    """Body of asample: a sampling session and a number in it, or a model by name."""

    prompt: Prompt
    sampling_params: SamplingParams
    num_samples: AtLeastOne = 1
    sampling_session_id: str | None = None
    seq_id: SeqId | None = None
    base_model: Name | None = None
    model_path: Name | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Count | None = None
    topk_sample_logprobs: Count | None = None
    target_prompt_logprobs: TargetTensor | None = None
    prompt_alt_tokens_k: Count | None = None
    prompt_logprobs_last_n: AtLeastOne | None = None


class Future(msgspec.Struct, frozen=True):
    """Body of retrieve_future and cancel_future.

    ``allow_metadata_only``: a large result may be announced by its size, to be asked for again.
    """

    request_id: Name
    allow_metadata_only: bool = False


class FutureGroup(msgspec.Struct, frozen=True):
    """Whose ends retrieve_futures tells: one clone of a sampling session."""

    sampling_session_id: str
    cloned_sampler_id: SeqId = 0
    type: Literal["sampling_session"] = "sampling_session"


class Futures(msgspec.Struct, frozen=True):
    """Body of retrieve_futures; ``timeout`` 0 asks for an answer at once."""

    target: FutureGroup
    prev_cursor: SeqId = 0
    timeout: Annotated[float, Meta(ge=0)] | None = None


class JoinSamplingSession(msgspec.Struct, frozen=True):
    """Body of join_sampling_session."""

    sampling_session_id: str


Body = TypeVar("Body", CreateSamplingSession, JoinSamplingSession, Sample, Future, Futures)


def parse(body: bytes, kind: type[Body]) -> Body:
    """Decode and check; a HeadwayError names the field that is wrong."""
    try:
        found = msgspec.json.decode(body, type=kind)
        check_keys(body)
        return found
    except (ValueError, RecursionError) as error:
        raise wrong_body(error, body) from None


def to_generation(
    body: Sample,
    *,
    model: str,
    idempotency_key: str,
    group: str,
    settings: GatewaySettings,
) -> generation_pb2.GenerationRequest:
    """The same wish in the scheduler's words, not yet anybody's.

    A sampling session is no conversation (one may hold thousands of unrelated prompts), so it
    does not become the scheduler's session_id; common prefixes are found without it.
    """
    if body.num_samples > settings.max_samples:
        raise invalid(f"num_samples is at most {settings.max_samples}.", "num_samples")
    request = generation_pb2.GenerationRequest(
        model=model,
        prompt_token_ids=_prompt_tokens(body.prompt),
        sampling=_sampling(body.sampling_params, settings),
        num_samples=body.num_samples,
        idempotency_key=idempotency_key,
        group=group,
    )
    request.sampling.top_logprobs = body.topk_sample_logprobs or 0
    request.queue_timeout.FromMilliseconds(round(settings.tinker_queue_timeout_s * 1000))
    request.abandon_after.FromMilliseconds(round(settings.tinker_abandon_after_s * 1000))
    _set_scoring(request, body)
    return request


def _set_scoring(request: generation_pb2.GenerationRequest, body: Sample) -> None:
    """What is asked about the prompt; a prompt of one token has nothing to score."""
    num_tokens = len(request.prompt_token_ids)
    last_n = body.prompt_logprobs_last_n
    if last_n is not None and not (body.prompt_logprobs and last_n < num_tokens):
        message = "prompt_logprobs_last_n needs prompt_logprobs, and is at most the prompt less 1."
        raise invalid(message, "prompt_logprobs_last_n")
    if body.prompt_alt_tokens_k and num_tokens < 2:
        raise invalid("A prompt of one token has no alternatives.", "prompt_alt_tokens_k")
    asks = (body.prompt_logprobs, body.topk_prompt_logprobs, body.prompt_alt_tokens_k)
    if any(asks):
        request.prompt_scoring.logprobs = bool(body.prompt_logprobs)
        request.prompt_scoring.top_logprobs = body.topk_prompt_logprobs or 0
        request.prompt_scoring.num_alternatives = body.prompt_alt_tokens_k or 0
        request.prompt_scoring.last_n = last_n or 0
    if body.target_prompt_logprobs is not None:
        set_targets(request, body.target_prompt_logprobs, num_tokens)


def _prompt_tokens(prompt: Prompt) -> list[int]:
    tokens = [token for chunk in _text_chunks(prompt) for token in chunk]
    if not tokens:
        raise invalid("The prompt has no tokens.", "prompt")
    return tokens


def _text_chunks(prompt: Prompt) -> Iterator[list[int]]:
    for number, chunk in enumerate(prompt.chunks):
        where = f"prompt.chunks[{number}]"
        if chunk.type != "encoded_text":
            message = f"{where}: chunks of type {chunk.type[:_MAX_ECHO]!r} are not supported."
            raise invalid(message, f"{where}.type")
        if chunk.tokens is None:
            raise invalid(f"{where}.tokens is missing.", f"{where}.tokens")
        yield chunk.tokens


def _sampling(params: SamplingParams, settings: GatewaySettings) -> generation_pb2.SamplingParams:
    sampling = generation_pb2.SamplingParams(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        logprobs=True,
    )
    if params.max_tokens is not None:
        sampling.max_tokens = params.max_tokens
    if params.seed is not None:
        sampling.seed = params.seed % 2**64  # a name for a stream; negative ones are names too
    if params.stop == []:
        sampling.ignore_eos = True  # nothing ends it but its length
    elif params.stop is not None:
        _set_stop(sampling, params.stop, settings)
    return sampling


def _set_stop(
    sampling: generation_pb2.SamplingParams,
    stop: str | list[str | int],
    settings: GatewaySettings,
) -> None:
    """Texts or ids; the model's own end-of-sequence tokens end a sample all the same."""
    field = "sampling_params.stop"
    items = [stop] if isinstance(stop, str) else stop
    if len(items) > settings.max_stop_strings:
        raise invalid(f"{field} has at most {settings.max_stop_strings} entries.", field)
    texts = [item for item in items if isinstance(item, str)]
    ids = [item for item in items if isinstance(item, int)]
    if texts and ids:
        raise invalid(f"{field} is a list of strings or of ints, not both.", field)
    if any(len(text) > settings.max_stop_string_chars for text in texts):
        raise invalid(f"{field} is too long.", field)
    sampling.stop_strings.extend(texts)
    sampling.stop_token_ids.extend(ids)
