"""From fleet.proto to the session's words, and nothing else; the way there is in translate.py."""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from executor_svc.core.engine import (
    FinishReason,
    Grammar,
    GrammarKind,
    PromptScoring,
    SamplingParams,
    SequenceEnd,
)
from executor_svc.core.messages import (
    Adopt,
    GeneratedSample,
    Grant,
    LeaseRef,
    LoadOrder,
    OrdersReceived,
    Welcomed,
)
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation

_FINISH_REASONS = {
    generation.FINISH_REASON_STOP: FinishReason.STOP,
    generation.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def decode_welcome(welcome: fleet.ExecutorWelcome) -> Welcomed:
    """What the session must know of a welcome."""
    adopts = (
        Adopt(
            held=_decode_ref(adopt.held),
            ref=_decode_ref(adopt.lease),
            handle=adopt.handle,
            next_index=tuple(adopt.next_index),
            has_prompt_scores=adopt.has_prompt_scores,
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
        scoring=_scoring(request),
        has_prompt_scores=grant.has_prompt_scores,
        cache_salt=request.tenant,
    )


def _scoring(request: generation.GenerationRequest) -> PromptScoring | None:
    if not request.HasField("prompt_scoring"):
        return None
    scoring = request.prompt_scoring
    return PromptScoring(
        wants_logprobs=scoring.logprobs,
        top_logprobs=scoring.top_logprobs,
        last_n=scoring.last_n,
        target_offsets=list(scoring.target_offsets),
        target_token_ids=list(scoring.target_token_ids),
        num_alternatives=scoring.num_alternatives,
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
        top_logprobs=sampling.top_logprobs,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=(
            sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
        ),
        logit_bias=tuple((bias.token_id, bias.bias) for bias in sampling.logit_bias),
        grammar=decode_grammar(sampling.grammar),
    )


def decode_grammar(grammar: generation.Grammar) -> Grammar | None:
    """None where the message is empty."""
    match grammar.WhichOneof("kind"):
        case "json_schema":
            return Grammar(GrammarKind.JSON_SCHEMA, (grammar.json_schema,))
        case "json_object":
            return Grammar(GrammarKind.JSON_OBJECT) if grammar.json_object else None
        case "regex":
            return Grammar(GrammarKind.REGEX, (grammar.regex,))
        case "choice":
            return Grammar(GrammarKind.CHOICE, tuple(grammar.choice.texts))
        case "sequence":
            return Grammar(GrammarKind.SEQUENCE, parts=_parts(grammar.sequence.grammars))
        case "any_of":
            return Grammar(GrammarKind.ANY_OF, parts=_parts(grammar.any_of.grammars))
        case "repetition":
            repetition = grammar.repetition
            most = repetition.max if repetition.HasField("max") else None
            parts = _parts([repetition.grammar])
            return Grammar(GrammarKind.REPETITION, parts=parts, times=(repetition.min, most))
        case "text_until":
            return Grammar(GrammarKind.TEXT_UNTIL, (grammar.text_until,))
    return None


def _parts(grammars: Iterable[generation.Grammar]) -> tuple[Grammar, ...]:
    return tuple(part for part in map(decode_grammar, grammars) if part is not None)


def _generated(sample: generation.SampleResult) -> GeneratedSample:
    return GeneratedSample(
        list(sample.token_ids),
        list(sample.logprobs),
        _decode_end(sample.end),
        list(sample.top_token_ids),
        list(sample.top_logprobs),
    )


def _decode_end(end: generation.SequenceEnd) -> SequenceEnd | None:
    """None where the sample goes on: the end is missing or says nothing."""
    reason = _FINISH_REASONS.get(end.reason)
    if reason is None:
        return None
    return SequenceEnd(
        key=end.handle,
        num_tokens=end.num_tokens,
        reason=reason,
        stop_string=end.stop_string if end.HasField("stop_string") else None,
        stop_token_id=end.stop_token_id if end.HasField("stop_token_id") else None,
    )
