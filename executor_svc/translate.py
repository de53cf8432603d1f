"""From the session's words to fleet.proto, and nothing else; the way back is in
translate_orders.py."""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from executor_svc.core.engine import (
    FinishReason,
    ModelAssets,
    ModelInfo,
    PromptScores,
    SequenceEnd,
)
from executor_svc.core.messages import (
    Frame,
    Heartbeat,
    HeldLease,
    LeaseEnded,
    LeaseRef,
    ModelChange,
    ModelState,
    Outcome,
    Report,
)
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation

_OUTCOMES = {
    Outcome.COMPLETED: fleet.LeaseEnded.OUTCOME_COMPLETED,
    Outcome.FAILED: fleet.LeaseEnded.OUTCOME_FAILED,
    Outcome.REVOKED: fleet.LeaseEnded.OUTCOME_REVOKED,
    Outcome.RETURNED: fleet.LeaseEnded.OUTCOME_RETURNED,
    Outcome.UNKNOWN: fleet.LeaseEnded.OUTCOME_UNKNOWN,
}
_MODEL_STATES = {
    ModelState.RESIDENT: fleet.ModelChange.STATE_RESIDENT,
    ModelState.ABSENT: fleet.ModelChange.STATE_ABSENT,
    ModelState.FAILED: fleet.ModelChange.STATE_FAILED,
}
_FINISH_REASONS = {
    FinishReason.STOP: generation.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation.FINISH_REASON_LENGTH,
}


def encode_hello(
    executor_id: str,
    incarnation: str,
    *,
    num_slots: int,
    max_models: int,
    models: Iterable[ModelInfo],
    held: Iterable[HeldLease],
) -> fleet.AttachRequest:
    """The first message of a stream."""
    hello = fleet.ExecutorHello(
        executor_id=executor_id,
        incarnation=incarnation,
        capacity=fleet.Capacity(num_slots=num_slots, max_models=max_models),
        models=[
            fleet.ModelOffer(
                card=_card(model),
                resident=model.is_resident,
                load_time=_duration(model.load_ms),
                exactness_class=model.exactness_class,
                loading=model.is_loading,
            )
            for model in models
        ],
        leases=[_held(lease) for lease in held],
    )
    return fleet.AttachRequest(hello=hello)


def encode_report(report: Report, *, max_models: int) -> fleet.AttachRequest:
    """A report; an empty frame is left out."""
    message = fleet.ExecutorReport(
        ended=[_ended(ended) for ended in report.ended],
        models=[_model_change(change) for change in report.models],
    )
    if report.num_slots is not None:
        message.capacity.num_slots = report.num_slots
        message.capacity.max_models = max_models
    if not report.frame.is_empty():
        _fill(message.frame, report.frame)
    return fleet.AttachRequest(report=message)


def encode_heartbeat(heartbeat: Heartbeat, *, num_steps: int) -> fleet.AttachRequest:
    """A sign of life."""
    return fleet.AttachRequest(
        heartbeat=fleet.ExecutorHeartbeat(
            handles=heartbeat.handles, last_handle=heartbeat.last_handle, num_steps=num_steps
        )
    )


def encode_assets(model: str, assets: ModelAssets) -> fleet.AttachRequest:
    """One model's files."""
    files = generation.ModelAssets(
        tokenizer_json=assets.tokenizer_json,
        tokenizer_config_json=assets.tokenizer_config_json,
        chat_template=assets.chat_template,
        generation_config_json=assets.generation_config_json,
    )
    offered = fleet.OfferedAssets(model=model, assets=files)
    return fleet.AttachRequest(report=fleet.ExecutorReport(assets=[offered]))


def _fill(message: generation.StepFrame, frame: Frame) -> None:
    message.handle.extend(frame.handle)
    message.index.extend(frame.index)
    message.token_id.extend(frame.token_id)
    message.logprob.extend(frame.logprob)
    message.ends.extend(_end(end) for end in frame.ends)
    if frame.num_top:
        message.num_top.extend(frame.num_top)
        message.top_token_id.extend(frame.top_token_id)
        message.top_logprob.extend(frame.top_logprob)
    message.prompt_scores.extend(_scores(scores) for scores in frame.prompt_scores)


def _scores(scores: PromptScores) -> generation.PromptScores:
    return generation.PromptScores(
        handle=scores.key,
        logprob=scores.logprob,
        top_token_id=scores.top_token_id,
        top_logprob=scores.top_logprob,
        target_logprob=scores.target_logprob,
        alternative_token_id=scores.alternative_token_id,
        alternative_logprob=scores.alternative_logprob,
    )


def _card(model: ModelInfo) -> generation.ModelCard:
    return generation.ModelCard(
        name=model.name,
        family=model.family,
        vocab_size=model.vocab_size,
        max_context_tokens=model.max_context_tokens,
        eos_token_ids=model.eos_token_ids,
        weights_digest=model.weights_digest,
        assets_digest=model.assets_digest,
        dtype=model.dtype,
    )


def _ref(ref: LeaseRef) -> fleet.LeaseRef:
    return fleet.LeaseRef(request_id=ref.request_id, epoch=ref.epoch, attempt=ref.attempt)


def _held(held: HeldLease) -> fleet.HeldLease:
    return fleet.HeldLease(
        lease=_ref(held.ref),
        model=held.model,
        num_slots=held.num_slots,
        num_tokens=held.num_tokens,
        ended=held.has_ended,
    )


def _end(end: SequenceEnd) -> generation.SequenceEnd:
    return generation.SequenceEnd(
        handle=end.key,
        num_tokens=end.num_tokens,
        reason=_FINISH_REASONS[end.reason],
        stop_string=end.stop_string,
        stop_token_id=end.stop_token_id,
    )


def _ended(ended: LeaseEnded) -> fleet.LeaseEnded:
    message = fleet.LeaseEnded(
        lease=_ref(ended.ref),
        outcome=_OUTCOMES[ended.outcome],
        num_tokens=ended.num_tokens,
        num_cached_prompt_tokens=ended.num_cached_prompt_tokens,
    )
    if ended.failure is not None:
        message.failure.reason = ended.failure.reason.value
        message.failure.message = ended.failure.message
    return message


def _model_change(change: ModelChange) -> fleet.ModelChange:
    message = fleet.ModelChange(
        model=change.model,
        state=_MODEL_STATES[change.state],
        load_time=_duration(change.load_ms),
        exactness_class=change.exactness_class,
    )
    if change.state is ModelState.FAILED:
        message.failure.reason = Reason.INTERNAL
        message.failure.message = change.message
    return message


def _duration(ms: int | None) -> Duration | None:
    return None if ms is None else Duration(seconds=ms // 1000, nanos=ms % 1000 * 1_000_000)
