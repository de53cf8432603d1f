"""Between fleet.proto and the session's words, and nothing else."""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from executor_svc.core.engine import (
    FinishReason,
    ModelAssets,
    ModelInfo,
    SamplingParams,
    SequenceEnd,
)
from executor_svc.core.messages import (
    Adopt,
    GeneratedSample,
    Grant,
    Heartbeat,
    HeldLease,
    LeaseEnded,
    LeaseRef,
    LoadOrder,
    ModelChange,
    ModelState,
    OrdersReceived,
    Outcome,
    Report,
    Welcomed,
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


# --- to the scheduler -----------------------------------------------------------------------


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
                card=_card(model), resident=model.is_resident, load_time=_duration(model.load_ms)
            )
            for model in models
        ],
        leases=[
            fleet.HeldLease(lease=_ref(h.ref), num_tokens=h.num_tokens, ended=h.has_ended)
            for h in held
        ],
    )
    return fleet.AttachRequest(hello=hello)


def encode_report(report: Report, *, max_models: int) -> fleet.AttachRequest:
    """A report; an empty frame is left out."""
    frame = report.frame
    message = fleet.ExecutorReport(
        ended=[_ended(ended) for ended in report.ended],
        models=[_model_change(change) for change in report.models],
    )
    if report.num_slots is not None:
        message.capacity.num_slots = report.num_slots
        message.capacity.max_models = max_models
    if frame.handle or frame.ends:
        message.frame.handle.extend(frame.handle)
        message.frame.index.extend(frame.index)
        message.frame.token_id.extend(frame.token_id)
        message.frame.logprob.extend(frame.logprob)
        message.frame.ends.extend(_end(end) for end in frame.ends)
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
        lease=_ref(ended.ref), outcome=_OUTCOMES[ended.outcome], num_tokens=ended.num_tokens
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
    )
    if change.state is ModelState.FAILED:
        message.failure.reason = Reason.INTERNAL
        message.failure.message = change.message
    return message


def _duration(ms: int | None) -> Duration | None:
    return None if ms is None else Duration(seconds=ms // 1000, nanos=ms % 1000 * 1_000_000)


# --- from the scheduler ---------------------------------------------------------------------


def decode_welcome(welcome: fleet.ExecutorWelcome) -> Welcomed:
    """What the session must know of a welcome."""
    adopts = (
        Adopt(
            held=_decode_ref(adopt.held),
            ref=_decode_ref(adopt.lease),
            handle=adopt.handle,
            next_index=tuple(adopt.next_index),
        )
        for adopt in welcome.adopts
    )
    return Welcomed(max(0, duration_ms(welcome.orphan_grace)), tuple(adopts))


def decode_orders(orders: fleet.ExecutorOrders) -> OrdersReceived:
    """Any orders; whether they make sense is for the session and the engine to say."""
    return OrdersReceived(
        grants=tuple(_grant(grant) for grant in orders.grants),
        acknowledged=tuple(_decode_ref(ref) for ref in orders.acknowledged),
        revokes=tuple(_decode_ref(ref) for ref in orders.revokes),
        loads=tuple(LoadOrder(load.model, tuple(load.evict)) for load in orders.loads),
    )


def duration_ms(duration: Duration) -> int:
    """Whole milliseconds of a protobuf duration, whatever its fields hold."""
    return duration.seconds * 1000 + duration.nanos // 1_000_000


def _decode_ref(ref: fleet.LeaseRef) -> LeaseRef:
    return LeaseRef(ref.request_id, ref.epoch, ref.attempt)


def _grant(grant: fleet.Grant) -> Grant:
    request = grant.request
    return Grant(
        ref=_decode_ref(grant.lease),
        handle=grant.handle,
        model=request.model,
        prompt_token_ids=list(request.prompt_token_ids),
        params=_params(request.sampling),
        num_samples=request.num_samples or 1,
        wants_logprobs=request.sampling.logprobs,
        generated=tuple(_generated(sample) for sample in grant.generated),
    )


def _params(sampling: generation.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop_token_ids=tuple(sampling.stop_token_ids),
        stop_strings=tuple(sampling.stop_strings),
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
    )


def _generated(sample: generation.SampleResult) -> GeneratedSample:
    return GeneratedSample(list(sample.token_ids), list(sample.logprobs), _decode_end(sample.end))


def _decode_end(end: generation.SequenceEnd) -> SequenceEnd | None:
    """None where the sample goes on: the end is missing or says nothing."""
    for reason, code in _FINISH_REASONS.items():
        if end.reason == code:
            return SequenceEnd(
                key=end.handle,
                num_tokens=end.num_tokens,
                reason=reason,
                stop_string=end.stop_string if end.HasField("stop_string") else None,
                stop_token_id=end.stop_token_id if end.HasField("stop_token_id") else None,
            )
    return None
