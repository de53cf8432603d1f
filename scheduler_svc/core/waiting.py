"""What is done for a head that found no place: load its model, or keep room for it.

Rule, in this order:
1. a model at its limit in the fleet waits for one of its own leases to end, and keeps no room;
2. loads: the first place of a model that has none (diversity), then more as far as they are worth
   it (residency.py);
3. a model with a home keeps slots there if its head needs several (drain.py, WIDE);
4. a model with no home that is not being loaded drains an executor for itself (DRAIN, TIME_SLICE),
   except in FIFO order, where nobody is made to wait for another model.

What time alone can change is looked at again when it did (ModelDue). A look at all executors that
led nowhere is not repeated until something happened that could lead somewhere.

Reservations wake whom they concern, who may reserve in turn. That must come to an end, and a circle
would be a fault in the rules above; should there be one, it is cut and costs a few tries now and
then, not the scheduler.
"""

from typing import Final

from scheduler_svc.core import drain, residency
from scheduler_svc.core.deadlines import ModelDue
from scheduler_svc.core.domain import Rank, RequestRecord, Why
from scheduler_svc.core.state import State

# reservations of one model in one event, far above what the rules lead to; then it waits so long
_MOST_RESERVATIONS: Final = 16
_CIRCLE_RETRY_MS: Final = 100


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
    if state.num_reserved.get(model, 0) < _MOST_RESERVATIONS:
        retry_ms = _sooner(retry_ms, _keep_room(state, head, rank))
    else:
        state.count("circle_cut")
        retry_ms = _sooner(retry_ms, state.now_ms + _CIRCLE_RETRY_MS)
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


def _keep_room(state: State, head: RequestRecord, rank: Rank) -> int | None:
    """Make or end a reservation; when to look again, None if time changes nothing."""
    model, fleet = head.request.model, state.fleet
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
        return search.retry_ms
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
