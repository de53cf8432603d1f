"""Models that cannot be loaded: when it is tried again, and when nobody is kept waiting for it.

Rule: a load that failed is not tried again on that executor before its pause is over:
load_backoff_ms, doubled by each failure in a row, at most load_backoff_max_ms. An executor that
dies of a load may come back under another name, so that is held against the model: no executor
tries it during such a pause, or before it is known. A load that works ends both, and a new process
starts without the failures of the one before it.

A model is refused when each executor that offers it and does not drain has failed it
max_load_failures times in a row, or so many in a row died of it; until the shortest pause is over,
and not while it is on one of them or on its way there. Whoever waits for it then ends with
NO_CAPACITY and what the last executor said, and so is answered who comes. After the pause the door
is open: the first who comes is the reason to try again, and if that fails too, everybody who came
meanwhile is told. So a broken model costs an executor one load in load_backoff_max_ms at most, and
only while somebody asks for it; one that was mended needs nobody's hand.
"""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Final

from headway.reasons import Reason
from scheduler_svc.core import lifecycle
from scheduler_svc.core.deadlines import RefusalDue
from scheduler_svc.core.domain import ExecutorRecord, Failing, LoadFailures, RequestRecord
from scheduler_svc.core.state import State

# ends decided in one event: more would hold up everything else
_MOST_ENDS: Final = 256


def retry_ms(state: State, executor: ExecutorRecord, model: str) -> int:
    """Until when an executor does not try to load a model; 0 or past: it may."""
    failures = executor.failures.get(model)
    own_ms = 0 if failures is None else failures.retry_ms
    failing = state.failing.get(model)
    if failing is None:
        return own_ms
    return max(own_ms, failing.deaths.retry_ms, failing.suspected_until_ms)


def failed(state: State, executor: ExecutorRecord, model: str, message: str) -> None:
    """An executor could not load a model; ``review`` follows when its books are in order."""
    _count(state, executor.failures.setdefault(model, LoadFailures()))
    _failing(state, model).message = message


def lost(state: State, executor: ExecutorRecord) -> None:
    """A session broke. If the executor was loading, it may have died of that: no other one is put
    at risk before its grace is over. One that was on its way out is above suspicion."""
    if executor.loading is not None and executor.is_serving:
        executor.lost_load = model = executor.loading.model
        _failing(state, model).suspected_until_ms = state.now_ms + state.settings.executor_grace_ms


def came_back(state: State, executor: ExecutorRecord) -> None:
    """In time, as the same process."""
    if executor.lost_load is not None:
        _failing(state, executor.lost_load).suspected_until_ms = 0
        executor.lost_load = None


def lost_for_good(state: State, executor: ExecutorRecord) -> None:
    """Its process is gone."""
    if executor.lost_load is not None:
        _died(state, executor.lost_load)
        executor.lost_load = None


def _died(state: State, model: str) -> None:
    """An executor died while it loaded a model. Several that do so in one pause, say with their
    machine, count once."""
    state.count("load.died")
    failing = _failing(state, model)
    if failing.deaths.retry_ms <= state.now_ms:
        _count(state, failing.deaths)
        failing.message = "The executor was lost while it loaded the model."
    review(state, model)


def worked(state: State, executor: ExecutorRecord, model: str) -> None:
    """An executor has the model."""
    executor.failures.pop(model, None)
    if state.failing.pop(model, None) is not None:
        state.deadlines.discard(RefusalDue(model))


def is_refused(state: State, model: str) -> bool:
    """Whether nobody can load it, and nobody tries for now."""
    failing = state.failing.get(model)
    return failing is not None and failing.refused_until_ms > state.now_ms


def explain(state: State, model: str) -> str:
    """What clients of a refused model are told."""
    words = state.failing[model].message
    return f"No executor can load the model {model!r}" + (f": {words}" if words else ".")


def review_offers(state: State, executor: ExecutorRecord) -> None:
    """An executor came, went, or began or ceased to drain: somebody else may be the last hope."""
    for model in [model for model in state.failing if model in executor.offered_models]:
        review(state, model)


def review(state: State, model: str) -> None:
    """Find out anew whether a model that failed somewhere is refused."""
    failing = state.failing.get(model)
    if failing is None:
        return
    is_suspected = failing.suspected_until_ms > state.now_ms
    if not failing.deaths.num and not is_suspected and not num_failed(state, model):
        del state.failing[model]
        state.deadlines.discard(RefusalDue(model))
        return
    failing.refused_until_ms = _refused_until_ms(state, model, failing.deaths)
    if is_refused(state, model) and model in state.queue.num_by_model:
        state.count("load.given_up")
        end_waiting(state, model)


def end_waiting(state: State, model: str) -> None:
    """Tell those who wait for a refused model, some now and the rest with the next Tick."""
    if not is_refused(state, model):
        return
    text = explain(state, model)
    for record in list(islice(_waiting(state, model), _MOST_ENDS)):
        lifecycle.finish(state, record, Reason.NO_CAPACITY, text)
    if model in state.queue.num_by_model:
        state.deadlines.set(RefusalDue(model), state.now_ms + 1)


def num_failed(state: State, model: str) -> int:
    """Executors on which the last load of a model failed."""
    return sum(model in executor.failures for executor in _members(state, model))


def _waiting(state: State, model: str) -> Iterator[RequestRecord]:
    flows = state.queue.flows[model]
    return chain.from_iterable(flows[band].in_order() for band in sorted(flows))


def _refused_until_ms(state: State, model: str, deaths: LoadFailures) -> int:
    """0 if somebody might load it, or has it."""
    most, able = state.settings.max_load_failures, []
    if model in state.fleet.loading:
        return 0
    for executor in _members(state, model):
        if not executor.is_draining:
            if model in executor.residences:
                return 0
            able.append(executor.failures.get(model))
    if deaths.num >= most:
        return deaths.retry_ms
    pauses_ms = [f.retry_ms for f in able if f is not None and f.num >= most]
    if not able or len(pauses_ms) < len(able):
        return 0
    return max(min(pauses_ms), deaths.retry_ms)


def _members(state: State, model: str) -> list[ExecutorRecord]:
    """Executors that offer a model."""
    groups = state.fleet.offer(model).groups
    return [executor for group in groups for executor in group.members.values()]


def _failing(state: State, model: str) -> Failing:
    return state.failing.setdefault(model, Failing())


def _count(state: State, failures: LoadFailures) -> None:
    settings = state.settings
    pause_ms = settings.load_backoff_ms * 2 ** min(failures.num, 30)
    failures.num += 1
    failures.retry_ms = state.now_ms + min(pause_ms, settings.load_backoff_max_ms)
