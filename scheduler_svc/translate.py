"""Proto <-> domain. Nothing else.

A request is refused here with a message that names the field (checks.py), or it is valid for good:
the core and the executors may rely on every bound.
"""

import hashlib
from array import array
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from functools import lru_cache

from google.protobuf import duration_pb2

from headway.errors import HeadwayError
from headway.v1 import generation_pb2 as generation
from scheduler_svc import scores
from scheduler_svc.checks import (
    bad,
    check_names,
    check_prompt,
    check_quota,
    check_sampling,
    check_scoring,
    too_long,
)
from scheduler_svc.core import answers, messages
from scheduler_svc.entropy import Entropy
from scheduler_svc.outputs import Output
from scheduler_svc.settings import SchedulerSettings

_OVERHEAD_BYTES = 4_096  # what a request costs besides its prompt and tokens
_ALTERNATIVE_BYTES = 8  # of an alternative or a score, at most: its token and its logprob
_UINT32_MAX = (1 << 32) - 1
_MAX_PREFIX_HASHES = 64
_entropy = Entropy()


def new_request_id() -> str:
    """Unguessable: whoever knows it and the tenant may read the result."""
    return "req_" + urlsafe_b64encode(_entropy.take(18)).decode()


@lru_cache(maxsize=4_096)
def duration(ms: int) -> duration_pb2.Duration:
    """Milliseconds as a Duration, to be copied and not to be changed: every request needs seven,
    and most of them were made before."""
    return duration_pb2.Duration(seconds=ms // 1_000, nanos=ms % 1_000 * 1_000_000)


def optional_duration(ms: int | None) -> duration_pb2.Duration | None:
    """Unset stays unset."""
    return None if ms is None else duration(ms)


def duration_ms(value: duration_pb2.Duration, field: str, *, least: int, most: int) -> int:
    """A client's duration, at least ``least`` (else refused), capped at ``most``."""
    ms: int = value.seconds * 1_000 + value.nanos // 1_000_000
    if ms < least:
        raise bad(field, f"must be at least {least} ms")
    return min(ms, most)


def body_hash(body: generation.GenerationRequest) -> bytes:
    """What makes two requests with one idempotency key the same; before defaults are drawn. The
    limits of whoever asks are not a part of it."""
    canonical = generation.GenerationRequest()
    canonical.CopyFrom(body)
    canonical.ClearField("idempotency_key")
    canonical.ClearField("quota")
    return hashlib.sha256(canonical.SerializeToString(deterministic=True)).digest()


def request_from_proto(
    received: generation.GenerationRequest,
    card: generation.ModelCard,
    settings: SchedulerSettings,
) -> tuple[messages.Request, generation.GenerationRequest]:
    """Check everything; gives also a copy of the body with all defaults. Raises HeadwayError.

    A copy, because a part of a received message keeps the whole message in memory. The quota is
    checked too, and is not in the copy: it is of whoever asks, not of the request.
    """
    body = generation.GenerationRequest()
    body.CopyFrom(received)
    check_names(body, settings)
    if body.HasField("quota"):
        check_quota(body.quota, settings)
        body.ClearField("quota")
    digest = body_hash(body) if body.idempotency_key else b""
    num_samples = max(1, body.num_samples)
    if num_samples > settings.max_samples:
        raise bad("num_samples", f"must not be above {settings.max_samples}")
    if not body.HasField("band"):
        body.band = settings.default_band
    if body.band >= settings.num_bands:
        raise bad("band", f"must be below {settings.num_bands}")
    check_prompt(body, card)
    check_sampling(body.sampling, card, settings)
    if body.HasField("prompt_scoring"):
        check_scoring(body, card, settings)
        if not scores.num_expected(body.prompt_scoring, len(body.prompt_token_ids)):
            body.ClearField("prompt_scoring")  # nothing is asked
    _fill_max_tokens(body, card, settings)
    if not body.sampling.HasField("seed"):
        body.sampling.seed = int.from_bytes(_entropy.take(8), "little") >> 1
    body.num_samples = num_samples
    queue_timeout_ms, execution_timeout_ms = _timeouts(body, settings)
    if body.HasField("abandon_after"):
        duration_ms(
            body.abandon_after, "abandon_after", least=1, most=settings.max_abandon_after_ms
        )
    num_bytes = _num_bytes(body)
    if num_bytes > settings.max_message_bytes:  # its result, or its next grant, could not travel
        raise bad("sampling.max_tokens", "with all that is asked for this is too much to travel")
    request = messages.Request(
        request_id=new_request_id(),
        tenant=body.tenant,
        model=body.model,
        band=body.band,
        num_prompt_tokens=len(body.prompt_token_ids),
        max_tokens=body.sampling.max_tokens,
        num_samples=num_samples,
        num_bytes=num_bytes,
        queue_timeout_ms=queue_timeout_ms,
        execution_timeout_ms=execution_timeout_ms,
        session_id=body.session_id,
        idempotency_key=body.idempotency_key,
        body_hash=digest,
        prefix_hashes=prefix_hashes(body, settings.prefix_block_tokens),
    )
    return request, body


def prefix_hashes(body: generation.GenerationRequest, block_tokens: int) -> tuple[int, ...]:
    """64-bit hashes of the prompt's first blocks, each over all blocks up to its own.

    Salted by tenant and model, for neither may find what another left in a KV cache.
    """
    if len(body.prompt_token_ids) < block_tokens:  # most chats: spares the salt's hash
        return ()
    tokens = array("I", body.prompt_token_ids[: _MAX_PREFIX_HASHES * block_tokens])
    data, block_bytes = memoryview(tokens.tobytes()), block_tokens * tokens.itemsize
    salt = f"{len(body.tenant)}:{body.tenant}{body.model}"
    so_far = hashlib.blake2b(key=hashlib.blake2b(salt.encode()).digest(), digest_size=8)
    hashes = []
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        so_far.update(data[start : start + block_bytes])
        hashes.append(int.from_bytes(so_far.digest(), "little"))
    return tuple(hashes)


def _num_bytes(body: generation.GenerationRequest) -> int:
    """What a request costs, its result included, until that expires."""
    sampling = body.sampling
    num_tokens = sampling.max_tokens * body.num_samples
    num_logprobs = num_tokens * sampling.top_logprobs
    if body.HasField("prompt_scoring"):
        num_logprobs += scores.num_expected(body.prompt_scoring, len(body.prompt_token_ids))
    bytes_per_token = 8 if sampling.logprobs else 4
    num_result_bytes = bytes_per_token * num_tokens + _ALTERNATIVE_BYTES * num_logprobs
    return _OVERHEAD_BYTES + body.ByteSize() + len(body.note) + num_result_bytes


def _fill_max_tokens(
    body: generation.GenerationRequest, card: generation.ModelCard, settings: SchedulerSettings
) -> None:
    sampling = body.sampling
    num_prompt_tokens = len(body.prompt_token_ids)
    room = card.max_context_tokens - num_prompt_tokens
    if not sampling.HasField("max_tokens"):
        sampling.max_tokens = min(room, settings.default_max_tokens)
    elif sampling.max_tokens > room:
        raise too_long(num_prompt_tokens, sampling.max_tokens, card)
    if sampling.min_tokens > sampling.max_tokens:
        raise bad("sampling.min_tokens", "must not be above max_tokens")


def _timeouts(body: generation.GenerationRequest, settings: SchedulerSettings) -> tuple[int, int]:
    queue_ms = settings.default_queue_timeout_ms
    if body.HasField("queue_timeout"):
        most = settings.max_queue_timeout_ms
        queue_ms = duration_ms(body.queue_timeout, "queue_timeout", least=1, most=most)
    execution_ms = settings.default_execution_timeout_ms
    if body.HasField("execution_timeout"):
        most = settings.max_execution_timeout_ms
        execution_ms = duration_ms(body.execution_timeout, "execution_timeout", least=1, most=most)
    body.queue_timeout.CopyFrom(duration(queue_ms))
    body.execution_timeout.CopyFrom(duration(execution_ms))
    return queue_ms, execution_ms


def check_next_index(next_index: Sequence[int], output: Output) -> None:
    """Where a client wants to go on must be inside the request."""
    if output.num_samples == 0:  # it failed; there is nothing but its end
        return
    if len(next_index) > output.num_samples:
        raise bad("next_index", f"the request has {output.num_samples} samples")
    if any(index > output.max_tokens for index in next_index):
        raise bad("next_index", f"the request has at most {output.max_tokens} tokens")


def failure(error: HeadwayError) -> generation.Failure:
    """An error on a stream."""
    return generation.Failure(
        reason=error.reason.value,
        message=error.message,
        retry_after=optional_duration(error.retry_after_ms),
    )


def status_to_proto(
    status: answers.RequestStatus, num_generated_tokens: int
) -> generation.QueueStatus:
    """Where a live request stands."""
    state = generation.QueueStatus.STATE_RUNNING
    if not status.is_running:
        state = generation.QueueStatus.STATE_WAITING
    return generation.QueueStatus(
        state=state,
        position=min(status.position, _UINT32_MAX),
        depth=min(status.depth, _UINT32_MAX),
        estimated_wait=optional_duration(status.estimated_wait_ms),
        retry_after=duration(status.retry_after_ms),
        num_generated_tokens=num_generated_tokens,
    )


def result_to_proto(
    finished: messages.RequestFinished, output: Output, note: bytes
) -> generation.GenerationResult:
    """The end of a request, as it is stored; a failed one keeps no samples and no scores."""
    attempts = output.attempts
    result = generation.GenerationResult(
        usage=generation.Usage(
            num_prompt_tokens=output.num_prompt_tokens,
            num_generated_tokens=output.num_tokens,
            num_cached_prompt_tokens=attempts.num_cached_prompt_tokens,
        ),
        timing=generation.Timing(
            queued=optional_duration(finished.queued_ms),
            first_token=optional_duration(finished.first_token_ms),
            total=duration(finished.total_ms),
            num_attempts=finished.num_attempts,
            model_wait=optional_duration(finished.model_wait_ms),
            executor_id=attempts.executor_id,
            inexact=attempts.is_inexact,
        ),
        note=note,
    )
    if finished.reason is None:
        result.samples.extend(output.samples())
        if output.prompt_scores is not None:
            result.prompt_scores.CopyFrom(output.prompt_scores)
    else:
        error = HeadwayError(
            finished.reason, finished.message, retry_after_ms=finished.retry_after_ms
        )
        result.failure.CopyFrom(failure(error))
    return result
