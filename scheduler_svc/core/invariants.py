"""What must hold between any two events, checked by looking at everything; for tests.

Rule: nothing here is believed because an index says so: each index is compared with the records
that it stands for.
"""

from collections import Counter

from scheduler_svc.core import drain, failing, priority, residency
from scheduler_svc.core.deadlines import (
    Deadline,
    GraceDue,
    LoadDue,
    ModelDue,
    RefusalDue,
    ReservationDue,
    RevokeDue,
)
from scheduler_svc.core.domain import LeaseState, RequestRecord, Why
from scheduler_svc.core.placement import can_take
from scheduler_svc.core.state import State


def check(state: State) -> None:
    """Raise AssertionError if the state contradicts itself."""
    _check_requests(state)
    _check_queue(state)
    _check_executors(state)
    _check_models(state)
    _check_reservations(state)
    _check_work_conservation(state)
    _check_deadlines(state)
    assert not state.waking.awake
    assert "circle_cut" not in state.decisions


def _waiting(state: State) -> list[RequestRecord]:
    waiting = [record for record in state.requests if record.lease is None]
    return sorted(waiting, key=lambda record: record.arrival)


def _check_requests(state: State) -> None:
    for record in state.requests:
        request_id = record.request.request_id
        assert state.requests.get(request_id) is record
        assert (record in state.queue) is (record.lease is None)
        assert (record.num_charged_tokens > 0) is (record.lease is not None)
        assert 0 <= record.num_crashes < state.settings.max_attempts
        assert 0 <= record.num_passed <= state.settings.locality_max_passes
        if record.lease is not None:
            executor = state.fleet.executors[record.lease.executor_id]
            assert executor.leases[record.lease.key] is record.lease
            assert record.lease.key == (request_id, state.epoch, record.attempt)
            assert record.lease.state is not LeaseState.REVOKING
    assert sum(state.num_live_by_tenant.values()) == len(state.requests)
    assert sum(state.num_live_by_model.values()) == len(state.requests)
    assert len(state.requests) <= state.settings.max_inflight


def _check_queue(state: State) -> None:
    waiting = _waiting(state)
    in_order = list(state.queue.in_order({}, [0] * state.settings.num_bands))
    assert sorted(record.arrival for record in in_order) == [r.arrival for r in waiting]
    assert [r.request.band for r in in_order] == sorted(r.request.band for r in waiting)
    assert state.queue.num_tokens == sum(record.request.num_tokens for record in waiting)
    assert state.queue.num_bytes == sum(record.request.num_bytes for record in waiting)
    assert state.queue.num_by_model == Counter(record.request.model for record in waiting)
    _check_accounts(state)
    for band, flows in enumerate(state.queue.bands):
        for model, flow in flows.items():
            its = [r for r in in_order if (r.request.band, r.request.model) == (band, model)]
            assert state.queue.head_of(band, model) is its[0]
            assert [flow.place(record).num_before for record in its] == list(range(len(its)))


def _check_accounts(state: State) -> None:
    """Fairness remembers who waits and what runs, and of the others as many as it may."""
    queue = state.queue
    open_tokens: Counter[tuple[tuple[int, str], str]] = Counter()
    waiting = set()
    leases = [
        lease for executor in state.fleet.executors.values() for lease in executor.leases.values()
    ]
    debtors = [lease.debtor for lease in leases if lease.debtor is not None]
    for record in [*state.requests, *debtors]:
        request = record.request
        name = ((request.band, request.model), request.tenant)
        if record.num_charged_tokens:
            open_tokens[name] += record.num_charged_tokens
        elif not record.is_returned:
            waiting.add(name)
    queue.fairness.check(open_tokens, waiting)


def _check_executors(state: State) -> None:
    num_by_model: Counter[str] = Counter()
    for executor in state.fleet.executors.values():
        slots = {True: 0, False: 0}
        for key, lease in executor.leases.items():
            assert lease.key == key
            assert lease.executor_id == executor.executor_id
            is_in_doubt = lease.state is LeaseState.IN_DOUBT
            assert is_in_doubt is (executor.session is None)
            slots[is_in_doubt] += lease.num_slots
            assert lease.state is not LeaseState.HELD or state.owner(lease) is not None
        assert (executor.num_leased, executor.num_in_doubt) == (slots[False], slots[True])
        assert executor.num_used == executor.num_leased + executor.num_in_doubt
        assert executor.num_free + executor.num_used == max(executor.num_slots, executor.num_used)
        assert executor.active == Counter(lease.model for lease in executor.leases.values())
        num_by_model.update(executor.active)
    assert state.num_leased_by_model == num_by_model


def _check_models(state: State) -> None:
    """The indexes over models say what the executors' records say."""
    fleet = state.fleet
    fleet.refresh()
    for executor in fleet.executors.values():
        assert set(executor.residences) <= executor.offered_models
        assert executor.loading is None or executor.session is not None
        num_idle = sum(model not in executor.active for model in executor.residences)
        assert num_idle >= executor.num_to_leave or not executor.has_memory
        for model in executor.offered_models:
            [group] = [g for g in fleet.offer(model).groups if executor.executor_id in g.members]
            assert (executor.executor_id in group.roomy) is executor.is_roomy
            is_home = (
                executor.is_serving
                and model in executor.residences
                and executor.num_kept_from(model) < executor.num_slots
            )
            assert (executor.executor_id in fleet.homes.get(model, {})) is is_home
            is_loading = (
                executor.is_serving
                and executor.loading is not None
                and executor.loading.model == model
            )
            assert (executor.executor_id in fleet.loading.get(model, {})) is is_loading
        assert executor.offered_models <= state.known_models.keys()
    assert state.num_live_by_model.keys() <= state.known_models.keys()
    assert state.totals.models.keys() == state.known_models.keys()
    assert all(fleet.homes.values())
    assert all(fleet.loading.values())
    _check_failing(state)


def _check_failing(state: State) -> None:
    """A refused model is nowhere, and nobody is left to wait for it; failures are of known ones."""
    assert state.failing.keys() <= state.known_models.keys()
    for model in state.failing:
        if failing.is_refused(state, model):
            assert model not in state.fleet.homes
            assert model not in state.fleet.loading


def _check_reservations(state: State) -> None:
    reservations = state.fleet.reservations
    reserved = [executor for executor in state.fleet.executors.values() if executor.reservation]
    assert len(reserved) == len(reservations)
    for executor in reserved:
        reservation = executor.reservation
        assert reservation is not None
        assert reservations[reservation.model] is reservation
        assert reservation.executor_id == executor.executor_id
        assert executor.is_serving
        head = state.queue.head(reservation.model)
        assert head is not None
        if reservation.why is Why.WIDE:
            assert reservation.model in executor.residences
            claimant = state.requests.get(reservation.request_id)
            assert claimant is not None
            assert state.queue.is_head(claimant)
        if reservation.why is Why.DRAIN:
            assert not drain.is_last_home(state, executor)
        if reservation.why in (Why.DRAIN, Why.TIME_SLICE):
            assert not state.fleet.warmth(reservation.model)
            assert not state.is_at_limit(reservation.model)


def _check_work_conservation(state: State) -> None:
    """No head waits although an executor has room for it, or could load its first place."""
    for model in state.queue.num_by_model:
        head = state.queue.head(model)
        assert head is not None
        if state.is_at_limit(model):
            continue
        shift = priority.shift(state.settings, state.fleet.warmth(model))
        rank = head.request.band, head.arrival - shift
        assert not any(can_take(e, head, rank) for e in state.fleet.executors.values())
        due_ms = state.deadlines.at_ms(ModelDue(model))
        is_late = due_ms is not None and due_ms <= state.now_ms  # the shell owes a Tick
        if not state.fleet.warmth(model) and not is_late:
            target = residency.Search(state, head, is_first=True).run()
            assert target is None or target.executor.reservation is not None
            _check_drains(state, head)


def _check_drains(state: State, head: RequestRecord) -> None:
    """A model without a place, whose turn it is, has what it could drain. (Before its turn it is
    enough to look now and then; and so it is where claims come and go.)"""
    model = head.request.model
    if state.settings.is_fifo or state.now_ms < drain.aged_ms(state, head):
        return
    if model not in state.fleet.reservations:
        found = drain.Drain(state, head, state.waking.rank(head)).find()
        assert found is None or found[0].reservation is not None


def _check_deadlines(state: State) -> None:
    expected: set[Deadline] = set(state.requests)
    expected |= {ReservationDue(model) for model in state.fleet.reservations}
    for executor in state.fleet.executors.values():
        if executor.session is None:
            expected.add(GraceDue(executor.executor_id))
        if executor.loading is not None:
            expected.add(LoadDue(executor.executor_id))
        for lease in executor.leases.values():
            if lease.state is LeaseState.REVOKING:
                expected.add(RevokeDue(executor.executor_id, lease.key))
    models = {due for due in state.deadlines if isinstance(due, ModelDue | RefusalDue)}
    assert {due.model for due in models} <= set(state.queue.num_by_model)
    assert set(state.deadlines) - models == expected
