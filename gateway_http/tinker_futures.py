"""Answers of retrieve_future: where a request stands, and what came of it.

Two kinds of client ask. An SDK poller (it sends X-Tinker-Request-Type) asks again without a pause,
so its request is held, and it reads only a queue state from its own short vocabulary. A plain
poller is answered at once with everything there is to know, and sleeps by itself.
"""

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from gateway_http.http_errors import json_response
from gateway_http.settings import GatewaySettings
from gateway_http.tinker_scoring import (
    alternatives,
    float32,
    int32,
    prompt_logprobs,
    prompt_rows,
    prompt_table,
    sampled_table,
    target_logprobs,
)
from headway.errors import TABLE
from headway.reasons import Reason
from headway.tinker.v1 import sample_pb2
from headway.v1 import generation_pb2

PROTOBUF = "application/x-protobuf"
_WORTH_TELLING_S = 10  # below this a waiting SDK user is not told that sampling is "paused"
_READ_TIMEOUT_MARGIN_S = 10
_POLLS_PER_WAIT = 4
_UNREACHABLE = "the scheduler cannot be reached; the request is kept"


def is_sdk_poller(headers: Mapping[str, str]) -> bool:
    """Whether this is the poll loop of the SDK's high-level client."""
    return "x-tinker-request-type" in headers


def hold_s(headers: Mapping[str, str], limit_s: float) -> float:
    """How long to hold an SDK poll: well inside the time after which its client gives up."""
    try:
        read_timeout_s = float(headers.get("x-stainless-read-timeout", ""))
    except ValueError:
        return limit_s
    if not 0 < read_timeout_s < math.inf:
        return limit_s
    return min(limit_s, max(read_timeout_s - _READ_TIMEOUT_MARGIN_S, read_timeout_s / 2))


def pending(
    request_id: str,
    status: generation_pb2.QueueStatus | None,
    headers: Mapping[str, str],
    settings: GatewaySettings,
) -> Response:
    """408 in the words of whoever asks; no status: the scheduler could not be asked."""
    if is_sdk_poller(headers):
        return _pending_sdk(request_id, status)
    return _pending_plain(request_id, status, headers, settings)


def finished(
    request_id: str,
    result: generation_pb2.GenerationResult,
    headers: Mapping[str, str],
    max_bytes: int | None,
) -> Response:
    """200 also for a failure: anything else would be retried, or end as a bare ValueError.

    A result above ``max_bytes`` is only announced; the client asks again when it has room for it.
    """
    if result.HasField("failure"):
        return json_response(_failure(result.failure))
    if PROTOBUF in headers.get("accept", ""):
        response = Response(_to_protobuf(result), media_type=PROTOBUF)
    else:
        response = json_response(_to_json(request_id, result))
    if max_bytes is not None and len(response.body) > max_bytes:
        size = len(response.body)
        return json_response({"status": "complete_metadata", "response_payload_size": size})
    return response


def _pending_sdk(request_id: str, status: generation_pb2.QueueStatus | None) -> Response:
    body = {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": "paused_capacity" if _is_worth_telling(status) else "active",
        "queue_state_reason": _reason(status),
    }
    return json_response(body, 408)


def _is_worth_telling(status: generation_pb2.QueueStatus | None) -> bool:
    """The SDK words it as a pause of all sampling."""
    if status is None:
        return True
    wait_s = _wait_s(status)
    is_long = wait_s is None or wait_s >= _WORTH_TELLING_S
    return is_long and status.state == generation_pb2.QueueStatus.STATE_WAITING


def _pending_plain(
    request_id: str,
    status: generation_pb2.QueueStatus | None,
    headers: Mapping[str, str],
    settings: GatewaySettings,
) -> Response:
    """The body always has all its keys; what is not known is null and has no header."""
    is_running = status is not None and status.state == generation_pb2.QueueStatus.STATE_RUNNING
    queue_state = "processing" if is_running else "waiting"
    retry_after_s = _retry_after_s(status, settings)
    body: dict[str, Any] = {
        "request_id": request_id,
        "type": "pending",
        "status": "queued",
        "queue_state": queue_state,
        "queue_state_reason": _reason(status),
        "queue_position": status.position if status else None,
        "queue_depth": status.depth if status else None,
        "estimated_wait_s": _wait_s(status) if status else None,
        "progress": {"num_generated_tokens": status.num_generated_tokens} if status else None,
        "retry_after_s": float(retry_after_s),
    }
    known = {
        "X-Queue-Position": body["queue_position"],
        "X-Queue-Depth": body["queue_depth"],
        "X-Queue-ETA-S": body["estimated_wait_s"],
    }
    answer = {name: str(value) for name, value in known.items() if value is not None}
    answer |= {"Retry-After": str(retry_after_s), "X-Queue-Status": queue_state}
    if "x-stainless-raw-response" in headers:
        # The base client would otherwise swallow ten answers before its user sees one.
        answer["x-should-retry"] = "false"
    return json_response(body, 408, answer)


def _retry_after_s(status: generation_pb2.QueueStatus | None, settings: GatewaySettings) -> int:
    """A part of the wait, so that its reader sees the queue move and a wrong guess corrected."""
    wait_s = status.retry_after.ToMilliseconds() / 1000 if status is not None else 0
    bounded = min(math.ceil(wait_s / _POLLS_PER_WAIT), settings.retry_after_max_s)
    return max(bounded, settings.retry_after_min_s)


def _wait_s(status: generation_pb2.QueueStatus) -> float | None:
    if not status.HasField("estimated_wait"):
        return None
    return status.estimated_wait.ToMilliseconds() / 1000


def _reason(status: generation_pb2.QueueStatus | None) -> str | None:
    """For people, who count from 1; the plain poller's queue_position counts from 0."""
    if status is None:
        return _UNREACHABLE
    if status.state != generation_pb2.QueueStatus.STATE_WAITING:
        return None
    place = status.position + 1
    text = f"position {place} of {max(status.depth, place)}"
    wait_s = _wait_s(status)
    return text if wait_s is None else f"{text}, about {math.ceil(wait_s)} s"


def _failure(failure: generation_pb2.Failure) -> dict[str, str]:
    """The SDK knows these categories in lower case only, and retries none of them."""
    row = TABLE[Reason.__members__.get(failure.reason, Reason.INTERNAL)]
    is_user = 400 <= row.http_status < 500 and not row.is_retryable
    return {"error": failure.message, "category": "user" if is_user else "server"}


def _to_json(request_id: str, result: generation_pb2.GenerationResult) -> dict[str, Any]:
    """Only tinker 0.22 reads it, which knows no alternatives of sampled or of named tokens."""
    sequences = [
        {
            "tokens": list(sample.token_ids),
            "logprobs": list(sample.logprobs) or None,
            "stop_reason": "length" if _is_length(sample) else "stop",
        }
        for sample in result.samples
    ]
    body: dict[str, Any] = {"sequences": sequences, "request_id": request_id, "type": "sample"}
    if result.HasField("prompt_scores"):
        scores, num_prompt_tokens = result.prompt_scores, result.usage.num_prompt_tokens
        if scores.logprob:
            body["prompt_logprobs"] = prompt_logprobs(scores)
        if scores.top_token_id:
            body["topk_prompt_logprobs"] = prompt_rows(scores, num_prompt_tokens)
    body["prompt_cache_hit_tokens"] = result.usage.num_cached_prompt_tokens
    return body


def _to_protobuf(result: generation_pb2.GenerationResult) -> bytes:
    """The SDK's own message; its arrays are little-endian whatever this machine is."""
    response = sample_pb2.SampleResponse(
        prompt_cache_hit_tokens=result.usage.num_cached_prompt_tokens
    )
    for sample in result.samples:
        response.sequences.add(
            stop_reason=sample_pb2.STOP_REASON_LENGTH
            if _is_length(sample)
            else sample_pb2.STOP_REASON_STOP,
            tokens=int32(sample.token_ids),
            logprobs=float32(sample.logprobs),
            topk_sampled_logprobs=sampled_table(sample) if sample.top_token_ids else None,
        )
    if result.HasField("prompt_scores"):
        _add_scores(response, result)
    return response.SerializeToString()


def _add_scores(
    response: sample_pb2.SampleResponse, result: generation_pb2.GenerationResult
) -> None:
    """What is there was asked for: the SDK takes an absent field for a server that is too old."""
    scores, num_prompt_tokens = result.prompt_scores, result.usage.num_prompt_tokens
    if scores.logprob:
        response.prompt_logprobs = float32(scores.logprob)
    if scores.top_token_id:
        response.topk_prompt_logprobs.CopyFrom(prompt_table(scores, num_prompt_tokens))
    if scores.alternative_token_id:
        response.prompt_alt_tokens.CopyFrom(alternatives(scores, num_prompt_tokens))
    if result.note:
        response.target_prompt_logprobs.CopyFrom(target_logprobs(result.note, scores))


def _is_length(sample: generation_pb2.SampleResult) -> bool:
    return sample.end.reason == generation_pb2.FINISH_REASON_LENGTH
