"""Requests as a scripted scheduler runs them, and the scripts by which it does."""

import math
from collections.abc import Sequence
from typing import Any

from google.protobuf import duration_pb2

from headway.reasons import Reason
from headway.v1 import generation_pb2, scheduler_pb2
from tests.gateway import tiny_model


class Run:
    """One accepted request: what it has produced so far."""

    def __init__(self, request_id: str, request: generation_pb2.GenerationRequest) -> None:
        self.request_id = request_id
        self.request = request
        num_samples = request.num_samples or 1
        self.tokens: list[list[int]] = [[] for _ in range(num_samples)]
        self.ends: list[generation_pb2.SequenceEnd | None] = [None] * num_samples
        self.finished: scheduler_pb2.Finished | None = None

    def emit(self, token_ids: Sequence[int], sample: int = 0) -> None:
        self.tokens[sample] += token_ids

    def end(self, sample: int = 0, **fields: Any) -> None:
        fields.setdefault("reason", generation_pb2.FINISH_REASON_STOP)
        self.ends[sample] = generation_pb2.SequenceEnd(
            num_tokens=len(self.tokens[sample]), **fields
        )

    def finish(self, failure: generation_pb2.Failure | None = None) -> None:
        usage = generation_pb2.Usage(
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_generated_tokens=sum(map(len, self.tokens)),
            num_cached_prompt_tokens=2,
        )
        timing = generation_pb2.Timing(num_attempts=1, executor_id="executor-1")
        timing.queued.FromMilliseconds(300)
        timing.model_wait.FromMilliseconds(100)
        timing.first_token.FromMilliseconds(500)
        timing.total.FromMilliseconds(1500)
        self.finished = scheduler_pb2.Finished(usage=usage, timing=timing, failure=failure)


def add_alternatives(frame: generation_pb2.StepFrame, token_id: int, num_top: int) -> None:
    """The token itself and the ones after it, half as likely each."""
    frame.num_top.append(num_top)
    for number in range(num_top):
        frame.top_token_id.append(token_id + number)
        frame.top_logprob.append(-0.5 - number)


def scores_of(
    request: generation_pb2.GenerationRequest, handle: int
) -> generation_pb2.PromptScores:
    """Prompt token i has the logprob -i, and alternatives as generated tokens have them."""
    scores = generation_pb2.PromptScores(handle=handle)
    rows = generation_pb2.StepFrame()
    for index, token_id in enumerate(request.prompt_token_ids):
        scores.logprob.append(-float(index) if index else math.nan)
        if index:
            add_alternatives(rows, token_id, request.prompt_scoring.top_logprobs)
    scores.top_token_id.extend(rows.top_token_id)
    scores.top_logprob.extend(rows.top_logprob)
    return scores


def reply_at_once(run: Run) -> None:
    """The default script: the tiny model's reply for every sample, then the end."""
    for sample in range(len(run.tokens)):
        limit = run.request.sampling.max_tokens
        token_ids = [*tiny_model.encode(tiny_model.REPLY), tiny_model.eos_id()]
        is_cut = bool(limit) and limit < len(token_ids)
        run.emit(token_ids[:limit] if is_cut else token_ids, sample)
        if is_cut:
            run.end(sample, reason=generation_pb2.FINISH_REASON_LENGTH)
        else:
            run.end(sample, stop_token_id=tiny_model.eos_id())
    run.finish()


def leave_alone(run: Run) -> None:
    """A script for tests that move the run themselves."""


def body_of(request: generation_pb2.GenerationRequest) -> generation_pb2.GenerationRequest:
    """What a repeated key has to repeat."""
    body = generation_pb2.GenerationRequest()
    body.CopyFrom(request)
    body.ClearField("idempotency_key")
    body.ClearField("quota")
    return body


def failure(reason: Reason, retry_after_ms: int = 0) -> generation_pb2.Failure:
    """A Failure as the scheduler sends it."""
    retry_after = None
    if retry_after_ms:
        retry_after = duration_pb2.Duration()
        retry_after.FromMilliseconds(retry_after_ms)
    return generation_pb2.Failure(
        reason=reason.value, message="refused by the test", retry_after=retry_after
    )
