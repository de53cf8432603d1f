"""Proto -> domain for what executors say, and every check of it that needs no state.

What a request carries is checked in translate.py, what a frame carries in relay.py.
"""

import re
from collections.abc import Sized

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from scheduler_svc import translate
from scheduler_svc.checks import bad, check_name
from scheduler_svc.core import messages
from scheduler_svc.settings import SchedulerSettings

_MAX_MESSAGE_CHARS = 500
_MAX_CLASS_CHARS = 128
_MAX_LEASES = 100_000  # in one message
_MAX_LOAD_MS = 86_400_000
_FOLDERS = re.compile(r"(?<![\w/:])/(?:[^\s/'\"]+/)+")

_OUTCOMES = {
    fleet.LeaseEnded.OUTCOME_COMPLETED: messages.LeaseOutcome.COMPLETED,
    fleet.LeaseEnded.OUTCOME_FAILED: messages.LeaseOutcome.FAILED,
    fleet.LeaseEnded.OUTCOME_REVOKED: messages.LeaseOutcome.REVOKED,
    fleet.LeaseEnded.OUTCOME_RETURNED: messages.LeaseOutcome.RETURNED,
    fleet.LeaseEnded.OUTCOME_UNKNOWN: messages.LeaseOutcome.UNKNOWN,
}
_MODEL_STATES = {
    fleet.ModelChange.STATE_RESIDENT: messages.ModelState.RESIDENT,
    fleet.ModelChange.STATE_ABSENT: messages.ModelState.ABSENT,
    fleet.ModelChange.STATE_FAILED: messages.ModelState.FAILED,
}
# What an executor may blame on a request; anything else is its own fault.
_FAILURE_REASONS = {Reason.INVALID_REQUEST, Reason.PROMPT_TOO_LONG, Reason.NO_CAPACITY}


def attached(
    hello: fleet.ExecutorHello, session: int, settings: SchedulerSettings
) -> messages.ExecutorAttached:
    """A registration; the models' cards are the catalog's business. Raises HeadwayError."""
    check_name(hello.executor_id, "executor_id", settings.max_name_chars)
    check_name(hello.incarnation, "incarnation", settings.max_name_chars)
    check_capacity(hello.capacity, settings)
    if len(hello.models) > settings.max_models_per_executor:
        raise out_of_turn("too many models are offered")
    _check_places(hello)
    for offer in hello.models:
        _check_class(offer.exactness_class)
    _check_held(hello, settings)
    return messages.ExecutorAttached(
        executor_id=hello.executor_id,
        session=session,
        incarnation=hello.incarnation,
        num_slots=hello.capacity.num_slots,
        max_models=hello.capacity.max_models,
        models=tuple(
            messages.ModelOffer(offer.card.name, offer.resident, _load_ms(offer), offer.loading)
            for offer in hello.models
        ),
        held=tuple(map(_held, hello.leases)),
    )


def _check_places(hello: fleet.ExecutorHello) -> None:
    """What is on the device or on its way there must have room, and one load goes on at a time."""
    loading = [offer for offer in hello.models if offer.loading]
    if len(loading) > 1 or any(offer.resident for offer in loading):
        raise out_of_turn("one model at most is loading, and none that is resident")
    if sum(offer.resident for offer in hello.models) + len(loading) > hello.capacity.max_models:
        raise out_of_turn("more models are resident or loading than capacity.max_models")


def _check_held(hello: fleet.ExecutorHello, settings: SchedulerSettings) -> None:
    """What an honest executor may hold; of leases that nobody knows any more this is believed."""
    check_leases(hello.leases)
    offered = {offer.card.name for offer in hello.models}
    most, num_running = settings.max_slots_per_executor, 0
    for held in hello.leases:
        _check_ref(held.lease, settings)
        check_name(held.model, "leases.model", settings.max_name_chars)
        if not 0 < held.num_slots <= most:
            raise bad("leases.num_slots", f"must be from 1 to {most}")
        if held.ended:
            continue
        if held.model not in offered:
            raise bad("leases.model", "must be offered where the lease runs")
        num_running += held.num_slots
    if num_running > most:
        raise bad("leases.num_slots", f"must not be above {most} for all that run")


def _held(held: fleet.HeldLease) -> messages.HeldLease:
    lease = held.lease
    return messages.HeldLease(
        lease.request_id, lease.epoch, lease.attempt, held.model, held.num_slots, held.ended
    )


def check_capacity(capacity: fleet.Capacity, settings: SchedulerSettings) -> None:
    """Raises HeadwayError."""
    if capacity.num_slots > settings.max_slots_per_executor:
        raise out_of_turn("capacity.num_slots is too large")
    if not 0 < capacity.max_models <= settings.max_models_per_executor:
        raise out_of_turn("capacity.max_models is out of range")


def model_changed(
    change: fleet.ModelChange, executor_id: str, session: int
) -> messages.ModelChanged:
    """What became of a model, in words that clients may see: files by their names, without folders
    of the executor's machine. Raises HeadwayError."""
    state = _MODEL_STATES.get(change.state)
    if state is None:
        raise out_of_turn("a model changes without a state")
    _check_class(change.exactness_class)
    message = _FOLDERS.sub("", words(change))
    return messages.ModelChanged(
        executor_id, session, change.model, state, _load_ms(change), message
    )


def check_leases(leases: Sized) -> None:
    """Whatever there is one of for each lease. Raises HeadwayError."""
    if len(leases) > _MAX_LEASES:
        raise out_of_turn("too many leases in one message")


def outcome(ended: fleet.LeaseEnded, settings: SchedulerSettings) -> messages.LeaseOutcome:
    """How a lease ended, by the executor's words. Raises HeadwayError."""
    _check_ref(ended.lease, settings)
    found = _OUTCOMES.get(ended.outcome)
    if found is None:
        raise out_of_turn("a lease ends without an outcome")
    return found


def failure(ended: fleet.LeaseEnded) -> tuple[Reason, str]:
    """What the client is told: the executor's words only where they are about the request."""
    if ended.failure.reason in _FAILURE_REASONS:
        return Reason(ended.failure.reason), words(ended) or "The executor refused it."
    return Reason.INTERNAL, "The executor failed."


def words(about: fleet.LeaseEnded | fleet.ModelChange) -> str:
    """What the executor says about a failure, cut to a bearable length."""
    return about.failure.message[:_MAX_MESSAGE_CHARS]


def out_of_turn(message: str) -> HeadwayError:
    """The executor broke the protocol."""
    return HeadwayError(Reason.INVALID_REQUEST, message)


def _check_ref(ref: fleet.LeaseRef, settings: SchedulerSettings) -> None:
    check_name(ref.request_id, "lease.request_id", settings.max_name_chars)


def _load_ms(message: fleet.ModelOffer | fleet.ModelChange) -> int | None:
    if not message.HasField("load_time"):
        return None
    return translate.duration_ms(message.load_time, "load_time", least=0, most=_MAX_LOAD_MS)


def _check_class(exactness_class: str) -> None:
    """Only compared, but kept."""
    check_name(exactness_class, "exactness_class", _MAX_CLASS_CHARS, may_be_empty=True)
