"""An attached session and what is said to it."""

from typing import Any

from executor_svc.core.engine import (
    FinishReason,
    LeaseFailure,
    ModelInfo,
    SamplingParams,
    SequenceEnd,
    StepOutput,
)
from executor_svc.core.messages import (
    Effect,
    Grant,
    LeaseRef,
    ModelChange,
    OrdersReceived,
    Report,
    StartLease,
    StepDone,
    Welcomed,
)
from executor_svc.core.session import Session

GRACE_MS = 1000


def model(name: str, *, is_resident: bool = True) -> ModelInfo:
    return ModelInfo(name, "f", 100, 100, (), "w", "a", "float32", is_resident)


MODELS = (model("m"), model("n", is_resident=False), model("o", is_resident=False))


def ref(name: str = "a", attempt: int = 1, epoch: int = 1) -> LeaseRef:
    return LeaseRef(name, epoch, attempt)


def grant(handle: int = 1, lease: LeaseRef | None = None, **changes: Any) -> Grant:
    fields: dict[str, Any] = {
        "ref": lease or ref(),
        "handle": handle,
        "model": "m",
        "prompt_token_ids": [1, 2],
        "params": SamplingParams(max_tokens=8),
    }
    return Grant(**(fields | changes))


def attached(max_leases: int = 100, max_report_tokens: int = 1000) -> Session:
    session = Session(
        MODELS,
        num_slots=4,
        max_models=2,
        max_leases=max_leases,
        max_report_tokens=max_report_tokens,
    )
    assert session.handle(Welcomed(GRACE_MS), 0) == []
    return session


def order(session: Session, **orders: Any) -> list[Effect]:
    return session.handle(OrdersReceived(**orders), 0)


def start(session: Session, *grants: Grant) -> list[int]:
    """Grant, and give the keys that the engine was told."""
    effects = order(session, grants=grants)
    assert all(isinstance(effect, StartLease) for effect in effects)
    return [effect.request.key for effect in effects if isinstance(effect, StartLease)]


def step(
    session: Session,
    *entries: tuple[int, int, int],
    ends: tuple[SequenceEnd, ...] = (),
    failures: tuple[LeaseFailure, ...] = (),
) -> None:
    """Entries are (key, index, token); the logprob of a token is its negative."""
    output = StepOutput(
        key=[key for key, _, _ in entries],
        index=[index for _, index, _ in entries],
        token_id=[token for _, _, token in entries],
        logprob=[-float(token) for _, _, token in entries],
        ends=list(ends),
        failures=list(failures),
    )
    assert session.handle(StepDone(output), 0) == []


def report(session: Session) -> Report:
    taken = session.take_report()
    assert taken is not None
    return taken


def entries(taken: Report) -> list[tuple[int, int, int]]:
    frame = taken.frame
    return list(zip(frame.handle, frame.index, frame.token_id, strict=True))


def length(key: int, num_tokens: int) -> SequenceEnd:
    return SequenceEnd(key, num_tokens, FinishReason.LENGTH)


def changes(session: Session) -> tuple[ModelChange, ...]:
    taken = session.take_report()
    return () if taken is None else taken.models
