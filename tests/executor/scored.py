"""Leases that want alternatives and scores."""

import math
from typing import Any

from executor_svc.core.engine import LeaseRequest, PromptScores, SamplingParams, StepOutput
from executor_svc.core.messages import Effect, Grant, OrdersReceived, StartLease, StepDone
from executor_svc.core.session import Session


def start(session: Session, *grants: Grant) -> list[LeaseRequest]:
    effects: list[Effect] = session.handle(OrdersReceived(grants=grants), 0)
    return [effect.request for effect in effects if isinstance(effect, StartLease)]


def step(session: Session, *entries: tuple[int, int, int], num_top: int = 2, **more: Any) -> None:
    """Entries are (key, index, token); alternative n of a token is the id n after it, at -n."""
    tops = [(token + n, -float(n)) for _, _, token in entries for n in range(num_top)]
    output = StepOutput(
        key=[key for key, _, _ in entries],
        index=[index for _, index, _ in entries],
        token_id=[token for _, _, token in entries],
        logprob=[-1.0] * len(entries),
        num_top=[num_top] * len(entries) if num_top else [],
        top_token_id=[token for token, _ in tops],
        top_logprob=[logprob for _, logprob in tops],
        **more,
    )
    assert session.handle(StepDone(output), 0) == []


def scores(key: int, num: int = 2) -> PromptScores:
    return PromptScores(key, [math.nan] + [-0.5] * (num - 1), [7] * (num - 1), [-0.25] * (num - 1))


def lease(key: int, prompt: tuple[int, ...] = (1, 2, 3), **fields: Any) -> LeaseRequest:
    params = fields.pop("params", SamplingParams(max_tokens=3, seed=7))
    return LeaseRequest(key, "mock", prompt, params, **fields)
