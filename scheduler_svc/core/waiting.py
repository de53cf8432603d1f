"""What is done for a head that found no place: load its model, or keep room for it.

Rule, in this order:
1. a model at its limit in the fleet waits for one of its own leases to end, and keeps no room;
2. loads: the first place of a model that has none (diversity), then more as far as they are worth
   it (residency.py);
3. a model with a home keeps slots there if its head needs several (drain.py, WIDE);
4. a model with no home that is not being loaded drains one for itself (DRAIN, TIME_SLICE), except
   in FIFO order, where nobody is made to wait for another model.

What time alone can change is looked at again when it did (ModelDue). A look at all executors that
led nowhere is not repeated until something happened that could lead somewhere.
"""

from scheduler_svc.core import drain, residency
from scheduler_svc.core.deadlines import ModelDue
from scheduler_svc.core.domain import Rank, RequestRecord, Why
from scheduler_svc.core.state import State


def wait(state: State, head: RequestRecord, rank: Rank) -> None:
    """A head goes to sleep; what was done for it wakes it."""
    model, fleet = head.request.model, state.fleet
    state.estimator.backlog_began(model, state.now_ms)
    state.waking.sleep(head)
    if state.is_at_limit(model):
        if model in fleet.reservations:
            state.end_reservation(model, "model limit")
            state.waking.sleep(head)
        return
    retry_ms = _load(state, head)
    warmth = fleet.warmth(model)
    reservation = fleet.reservations.get(model)
    if warmth and reservation is not None and reservation.why in (Why.DRAIN, Why.TIME_SLICE):
        state.end_reservation(model, "has a place")
    if warmth == 1.0:
        if head.request.num_samples > 1:
            drain.claim(state, head, rank)
    elif not warmth and reservation is None and not state.settings.is_fifo:
        search = drain.Drain(state, head, rank)
        search.reserve()
        retry_ms = _sooner(retry_ms, search.retry_ms)
    _look_again(state, model, retry_ms)


def _load(state: State, head: RequestRecord) -> int | None:
    """Order what loads there are reasons for; when to look again, None if time changes nothing."""
    model = head.request.model
    is_first = not state.fleet.warmth(model)
    if not is_first and not (
        state.fleet.has_open(model) and residency.is_worth_another(state, model)
    ):
        return None
    search = residency.Search(state, head, is_first)
    target = search.run()
    if target is None:
        return search.retry_ms
    residency.order(state, head, target, is_first, search.targets)
    state.waking.wake(model)  # for one more, after those whose claim is larger now
    return None


def _sooner(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _look_again(state: State, model: str, retry_ms: int | None) -> None:
    if retry_ms is None:
        state.deadlines.discard(ModelDue(model))
    else:
        state.deadlines.set(ModelDue(model), max(retry_ms, state.now_ms + 1))
