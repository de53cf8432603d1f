"""Reservations: an executor's room is kept for a model that would not get it otherwise.

Rule: a model has one reservation at most, an executor belongs to one at most, and it lasts until
it did its work, has no purpose left, or its deadline comes. Why (domain.Why):

- DRAIN: a model with no home, not being loaded, finds every executor that offers it full of other
  models at work. The executor that will be empty soonest (ties: most free slots, then order of
  attach) takes nothing new of other models, except what surely ends before (backfill), until one
  of its models is idle and makes room for the load. Reservations count together: no model at work
  there may lose its last usable home, that is an executor that serves, offers it, and is reserved
  for nobody else.
  Until the cold head has aged past the bonus, no drain takes an executor where somebody waits for
  a model at work there: that would cost more waits than it saves.
- TIME_SLICE: the same on somebody's last usable home, for a head that has aged past the bonus.
- LOAD: from the order to load a model's first place until its first grant there, as many seats
  are kept as its head needs; a head that needs more than are free then goes on with a claim.
- WIDE: order inside a model is strict, nothing jumps over a head that needs more slots than are
  free. So that other models do not take every slot as it frees and starve it, it claims the home
  where the fewest slots are missing: requests that rank after it get nothing there, requests that
  rank before it may. A claim yields to a reservation, a claim or the load of a first place of who
  ranks before it, in its own model too, and gains when its head's rank does, past the limit of its
  band. Where its band is owed a grant (bands.py) it ranks before everybody, as long as it is: the
  slot that comes free there is offered to it first and is not enough, so without a claim the share
  would be words.

Switch budget: DRAIN and TIME_SLICE lead to forced switches (residency.py), so none is made on an
executor that still dwells after its last one. Together: a cold head starts at the latest E after
its arrival + the dwell + what still runs there + the load, behind those of its flow before it.
"""

from typing import Final

from scheduler_svc.core import explain, failing, waking
from scheduler_svc.core.domain import ExecutorRecord, Rank, RequestRecord, Reservation, Why
from scheduler_svc.core.placement import fronts, is_claimed, num_missing
from scheduler_svc.core.state import State

# claims come and go with every wide head; whom one of them barred looks again so much later
CLAIM_RETRY_MS: Final = 1_000

# (is a last home, empty at, -free slots, number)
_Key = tuple[bool, int, int, int]


def claim(state: State, head: RequestRecord, rank: Rank) -> None:
    """Keep the slots of one home for a head that needs several, if that makes sense.

    A head that needs one slot needs no claim: the next free slot goes by rank anyway.
    """
    if head.request.num_samples == 1:
        return
    owing = state.waking.owing(head)
    if owing is not None:
        rank = waking.OWED, rank[1]
    if not _may_claim(state, head, rank, owing):
        return
    own = state.fleet.reservations.get(head.request.model)
    found = [
        executor
        for _, executor in fronts(state, head, rank)
        if executor.reservation in (None, own) or executor.reservation.why is Why.WIDE
    ]
    if owing is not None:
        found = [owing] if owing in found else []
    if not found:
        return
    nearest = min(found, key=lambda executor: (num_missing(head, executor), executor.number))
    if own is not None and own.why is Why.LOAD:  # no other head of the model may have these seats
        state.end_reservation(head.request.model, "claimed")
    displace(state, nearest)
    text = f"{Why.WIDE} on {nearest.executor_id}; slots missing: {num_missing(head, nearest)}"
    state.reserve(nearest, head, Why.WIDE, head.deadline_ms, 0, 0, text)


def _may_claim(state: State, head: RequestRecord, rank: Rank, owing: ExecutorRecord | None) -> bool:
    """Whether the model has nothing reserved, or a claim that this head has a better right to, or
    may now have where a grant is owed to it."""
    reservation = state.fleet.reservations.get(head.request.model)
    if reservation is None or reservation.why is Why.LOAD:
        return True
    if reservation.why is not Why.WIDE or reservation.rank <= rank:
        return False
    is_there = owing is None or reservation.executor_id == owing.executor_id
    if is_there and reservation.request_id == head.request.request_id:
        reservation.rank = rank
        return False
    state.end_reservation(head.request.model, "taken over")
    return True


def displace(state: State, executor: ExecutorRecord) -> None:
    """A claim there ends, because somebody with a better right takes the executor over."""
    if executor.reservation is not None:
        assert executor.reservation.why is Why.WIDE
        state.end_reservation(executor.reservation.model, "taken over")


class Drain:
    """The choice of an executor to drain for a cold head."""

    def __init__(self, state: State, head: RequestRecord, rank: Rank) -> None:
        self._state = state
        self._head = head
        self._rank = rank
        self._aged_ms = aged_ms(state, head)
        # all candidates, for the decision log only
        self._found: list[tuple[_Key, ExecutorRecord]] | None = (
            [] if state.settings.has_decision_log else None
        )
        # when looking again may find one that time alone makes
        self.retry_ms: int | None = None

    def find(self) -> tuple[ExecutorRecord, _Key] | None:
        """The executor to drain, None if none can be drained now."""
        best: ExecutorRecord | None = None
        best_key: _Key | None = None
        for group in self._state.fleet.offer(self._head.request.model).groups:
            for executor in group.members.values():
                if self._is_candidate(executor):
                    key = self._key(executor)
                    if self._found is not None:
                        self._found.append((key, executor))
                    if best_key is None or key < best_key:
                        best, best_key = executor, key
        return None if best is None or best_key is None else (best, best_key)

    def reserve(self) -> None:
        """Make the reservation if one can be made now."""
        found = self.find()
        if found is None:
            return
        best, best_key = found
        state = self._state
        displace(state, best)
        why = Why.TIME_SLICE if best_key[0] else Why.DRAIN
        deadline_ms = latest_end_ms(state, best)
        text = ""
        if self._found is not None:
            self._found.sort(key=lambda found: found[0])
            text = explain.drain(state, why, [(key[1], other) for key, other in self._found])
        state.reserve(best, self._head, why, deadline_ms, best.num_slots, best_key[1], text)
        if why is Why.TIME_SLICE:
            review(state)

    def _is_candidate(self, executor: ExecutorRecord) -> bool:
        """Blocked by max_models alone, and not otherwise spoken for."""
        model, now_ms = self._head.request.model, self._state.now_ms
        reservation = executor.reservation
        if (
            not executor.is_serving
            or executor.has_memory
            or executor.loading is not None
            or not executor.max_models
            or model in executor.residences
            or (reservation is not None and reservation.why is not Why.WIDE)
        ):
            return False
        if is_claimed(executor, self._head, self._rank):
            self._again(now_ms + CLAIM_RETRY_MS)
            return False
        if now_ms < self._aged_ms and any(map(self._is_wanted, executor.active)):
            self._again(self._aged_ms)
            return False
        retry_ms = failing.retry_ms(self._state, executor, model)
        ready_ms = max(executor.next_switch_ms, retry_ms)
        if ready_ms > now_ms:
            self._again(ready_ms)
            return False
        if now_ms < self._aged_ms and is_last_home(self._state, executor):
            self._again(self._aged_ms)
            return False
        return True

    def _is_wanted(self, model: str) -> bool:
        """Whether somebody waits for a model at work there: it keeps its home for now."""
        return model in self._state.queue.num_by_model

    def _key(self, executor: ExecutorRecord) -> _Key:
        state = self._state
        empty_ms = state.now_ms
        for model in executor.active:
            residence = executor.residences.get(model)
            mean_ms = state.estimator.mean_lease_ms(model)
            if residence is not None and mean_ms is not None:
                empty_ms = max(empty_ms, residence.last_grant_ms + round(mean_ms))
        is_last = is_last_home(state, executor)
        return is_last, empty_ms, -executor.num_free, executor.number

    def _again(self, at_ms: int) -> None:
        if self.retry_ms is None or at_ms < self.retry_ms:
            self.retry_ms = at_ms


def aged_ms(state: State, head: RequestRecord) -> int:
    """When those who wait for a model have aged past the bonus: its head has, or its oldest request
    twice over. For the head may always be somebody who just came and soon gives up."""
    aging_ms = state.settings.aging_equalization_ms
    oldest_ms = state.queue.oldest_ms(head.request.model)
    return min(head.accepted_ms + aging_ms, oldest_ms + 2 * aging_ms)


def is_last_home(state: State, executor: ExecutorRecord) -> bool:
    """Whether some model at work there, or on another executor that drains, has no other usable
    home."""
    fleet = state.fleet
    at_work = set(executor.active)
    for reservation in fleet.reservations.values():
        if reservation.why in (Why.DRAIN, Why.TIME_SLICE):
            drained = fleet.executors[reservation.executor_id]
            at_work.update(executor.offered_models.intersection(drained.active))
    return any(not fleet.has_other_home(model, executor) for model in at_work)


def latest_end_ms(state: State, executor: ExecutorRecord) -> int:
    """When every lease that is there now has ended, by its request's execution deadline."""
    latest_ms = state.now_ms + state.settings.revoke_timeout_ms
    for lease in executor.leases.values():
        record = state.owner(lease)
        if record is not None:
            latest_ms = max(latest_ms, record.deadline_ms + state.settings.revoke_timeout_ms)
    return latest_ms


def review(state: State) -> None:
    """An executor ceased to serve, or drains now: a drain elsewhere may hold somebody's last home.
    It ends, unless its owner has aged: then it is a time slice."""
    for reservation in list(state.fleet.reservations.values()):
        if reservation.why is Why.DRAIN:
            executor = state.fleet.executors[reservation.executor_id]
            owner = _owner(state, reservation)
            if owner is None or not is_last_home(state, executor):
                continue
            if state.now_ms >= aged_ms(state, owner):
                reservation.why = Why.TIME_SLICE
            else:
                state.end_reservation(reservation.model, "last home")


def _owner(state: State, reservation: Reservation) -> RequestRecord | None:
    """Who waits for it: the request that it was made for, as long as that waits. It need not be the
    head of its model, which may have another one in an earlier band."""
    record = state.requests.get(reservation.request_id)
    if record is None or record.lease is not None:
        return state.queue.head(reservation.model)
    return record
