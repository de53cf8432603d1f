"""A slot that came free goes to the best head of the models that are resident there.

Rule: this is what placement would decide (scheduler.py), found without looking anywhere else. A
fleet that is full sees one lease end at a time, and whoever waits for a model there waits because
no executor has room for it: so the freed one is the only place to consider, and its resident
models are the only ones whose heads may go. Where that is not so, because something may be loaded
instead, or is reserved, limited or wide, everybody concerned is woken and tried as usual.
"""

from scheduler_svc.core import explain, leases, placement
from scheduler_svc.core.domain import ExecutorRecord, RequestRecord
from scheduler_svc.core.state import State


def hand_over(state: State, executor: ExecutorRecord) -> None:
    """Grant the slots that a lease's end gave back, or wake whom they may concern."""
    if not _is_among_residents(state, executor):
        state.wake_users(executor)
        return
    waking = state.waking
    while executor.num_free and (head := waking.next_resident(executor)) is not None:
        if state.now_ms > head.deadline_ms or head.request.num_samples > 1:
            waking.wake_residents(executor)
            return
        give(state, head, executor)
        if head.request.model not in state.queue.num_by_model:
            state.head_changed(head.request.model)
    waking.awake.clear()


def give(state: State, head: RequestRecord, executor: ExecutorRecord) -> None:
    """Grant a head, or who may jump it, on the executor that was found for it; ``head_changed`` is
    left to the caller."""
    chosen = placement.jump(state, head, executor)
    if state.settings.has_decision_log:
        state.decide("grant", chosen, explain.grant(state, chosen, executor))
    leases.grant(state, chosen, executor)


def _is_among_residents(state: State, executor: ExecutorRecord) -> bool:
    """Whether a slot concerns nobody but the heads of models that are resident there, and those
    no other slot."""
    fleet, waking = state.fleet, state.waking
    return (
        not waking.awake
        and not fleet.reservations
        and not state.settings.model_limits
        and executor.is_serving
        and fleet.is_only_room(executor)
        and not (executor.is_roomy and (fleet.is_open(executor) or waking.could_load(executor)))
    )
