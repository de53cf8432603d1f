"""What must hold between any two events, checked by looking at everything; for tests.

Rule: nothing here is believed because an index says so: each index is compared with the records
that it stands for.
"""

from scheduler_svc.core.deadlines import Deadline, GraceDue, RequestDue, RevokeDue
from scheduler_svc.core.domain import ExecutorRecord, LeaseState, RequestRecord
from scheduler_svc.core.placement import is_barred, num_missing
from scheduler_svc.core.state import State


def check(state: State) -> None:
    """Raise AssertionError if the state contradicts itself."""
    _check_requests(state)
    _check_queue(state)
    _check_executors(state)
    _check_claims(state)
    _check_work_conservation(state)
    _check_deadlines(state)
    assert not len(state.woken)


def _waiting(state: State) -> list[RequestRecord]:
    waiting = [record for record in state.requests.values() if record.lease is None]
    return sorted(waiting, key=lambda record: record.rank)


def _check_requests(state: State) -> None:
    for request_id, record in state.requests.items():
        assert record.request.request_id == request_id
        assert (record in state.queue) is (record.lease is None)
        assert 0 <= record.num_crashes < state.settings.max_attempts
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
    assert list(state.queue.in_order()) == waiting
    assert state.queue.num_tokens == sum(record.request.num_tokens for record in waiting)
    assert state.queue.num_bytes == sum(record.request.num_bytes for record in waiting)
    for model in {record.request.model for record in waiting}:
        head = next(record for record in waiting if record.request.model == model)
        assert state.queue.head(model) is head


def _check_executors(state: State) -> None:
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
        assert executor.num_free + executor.num_used == max(executor.num_slots, executor.num_used)


def _check_claims(state: State) -> None:
    claims = state.fleet.claims
    assert list(claims) == [claim.model for claim in claims.values()]
    claimed = [executor for executor in state.fleet.executors.values() if executor.claim]
    assert len(claimed) == len(claims)
    for executor in claimed:
        claim = executor.claim
        assert claim is not None
        assert claims[claim.model] is claim
        assert executor.is_serving
        assert claim.model in executor.resident_models
        head = state.queue.head(claim.model)
        assert head is not None
        assert (head.request.request_id, head.rank) == (claim.request_id, claim.rank)


def _check_work_conservation(state: State) -> None:
    """No head waits although some executor has room for it."""

    def is_usable(executor: ExecutorRecord, head: RequestRecord) -> bool:
        return (
            executor.is_serving
            and head.request.model in executor.resident_models
            and num_missing(head, executor) <= 0
            and not is_barred(executor, head.request.model, head.rank)
        )

    for model in {record.request.model for record in _waiting(state)}:
        head = state.queue.head(model)
        assert head is not None
        assert not any(is_usable(executor, head) for executor in state.fleet.executors.values())


def _check_deadlines(state: State) -> None:
    expected: set[Deadline] = {RequestDue(request_id) for request_id in state.requests}
    for executor in state.fleet.executors.values():
        if executor.session is None:
            expected.add(GraceDue(executor.executor_id))
        for lease in executor.leases.values():
            if lease.state is LeaseState.REVOKING:
                expected.add(RevokeDue(executor.executor_id, lease.key))
    assert set(state.deadlines) == expected
