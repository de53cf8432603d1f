"""The state that all policies share, and the few moves that several of them make.

Rule: every request is in ``requests`` from acceptance to its one end, and there either in the
queue or leased. ``finish`` is the compare-and-set of the end: it takes the record out of
``requests``, so a second end finds nothing to end.

Waking: placement does not look through the queue. Whatever may let a model's head go (a new head,
free slots, a claim that ended) wakes that model; placement tries the woken ones by rank and no
others. A model that is not awake has no head, or has one that is known to have no place.
"""

from collections import Counter

from headway.reasons import Reason
from scheduler_svc.core.deadlines import Deadlines, RequestDue
from scheduler_svc.core.domain import (
    RETRYABLE,
    CoreSettings,
    ExecutorRecord,
    Lease,
    Rank,
    RequestRecord,
)
from scheduler_svc.core.estimate import Estimator
from scheduler_svc.core.idempotency import IdempotencyKeys
from scheduler_svc.core.lazy_heap import LazyHeap
from scheduler_svc.core.messages import Action, Effects, Record, Request, RequestFinished
from scheduler_svc.core.placement import Fleet
from scheduler_svc.core.queue import Queue


class State:
    """Everything the scheduler knows, and the effects of the event in hand."""

    def __init__(self, settings: CoreSettings, epoch: int) -> None:
        self.settings = settings
        self.epoch = epoch
        # when the event in hand happened; never goes back
        self.now_ms = 0
        self.is_closing = False
        # the live ones: at most max_inflight
        self.requests: dict[str, RequestRecord] = {}
        self.num_live_by_tenant: Counter[str] = Counter()
        self.num_live_by_model: Counter[str] = Counter()
        # ever offered, oldest first; at most max_known_models
        self.known_models: dict[str, None] = {}
        self.queue = Queue(settings)
        self.fleet = Fleet()
        self.keys = IdempotencyKeys(settings)
        self.deadlines = Deadlines()
        self.estimator = Estimator(settings, self.queue, self.fleet)
        # what was decided how often; a fixed set of names
        self.decisions: Counter[str] = Counter()
        # models whose head placement must try, by the rank of that head
        self.woken: LazyHeap[Rank, str] = LazyHeap()
        self._num_arrivals = 0
        self._num_executors = 0
        self._persist: list[Record] = []
        self._send: list[Action] = []

    # --- effects ------------------------------------------------------------------------

    def send(self, action: Action) -> None:
        """Tell somebody."""
        self._send.append(action)

    def record(self, record: Record) -> None:
        """Persist something, then tell."""
        self._persist.append(record)
        self._send.append(record)

    def take_effects(self) -> Effects:
        """What the event in hand led to."""
        effects = Effects(tuple(self._persist), tuple(self._send))
        self._persist.clear()
        self._send.clear()
        return effects

    # --- requests -----------------------------------------------------------------------

    def accept(self, request: Request) -> None:
        """A new request starts to wait; the caller checked the bounds."""
        self._num_arrivals += 1
        deadline_ms = self.now_ms + request.queue_timeout_ms
        record = RequestRecord(request, self._num_arrivals, self.now_ms, deadline_ms)
        self.requests[request.request_id] = record
        self.num_live_by_tenant[request.tenant] += 1
        self.num_live_by_model[request.model] += 1
        self.keys.add(request)
        self.deadlines.set(RequestDue(request.request_id), deadline_ms)
        self.queue.add(record)
        self.wake(request.model)

    def finish(self, record: RequestRecord, reason: Reason | None, message: str = "") -> None:
        """End a live request; a lease that it has stays in its executor's books."""
        request = record.request
        del self.requests[request.request_id]
        for counter, name in (
            (self.num_live_by_tenant, request.tenant),
            (self.num_live_by_model, request.model),
        ):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]
        self.keys.finished(request, self.now_ms)
        self.deadlines.discard(RequestDue(request.request_id))
        if record.lease is None:
            self.queue.remove(record)
            self.wake(request.model)
        self.decisions[f"finished.{reason or 'OK'}"] += 1
        self.record(self._end_of(record, reason, message))

    def requeue(self, record: RequestRecord, why: str) -> None:
        """A leased request goes back to the head of its flow; its execution clock runs on."""
        record.lease = None
        self.queue.add(record)
        self.decisions[f"requeued.{why}"] += 1
        self.wake(record.request.model)

    def owner(self, lease: Lease) -> RequestRecord | None:
        """The live request that this lease speaks for; None if it ended or has another lease."""
        record = self.requests.get(lease.key[0])
        return record if record is not None and record.lease is lease else None

    def start_clock(self, record: RequestRecord) -> None:
        """The first grant ends the queueing clock and starts the executing one."""
        if record.first_grant_ms is None:
            record.first_grant_ms = self.now_ms
            record.deadline_ms = self.now_ms + record.request.execution_timeout_ms
            self.deadlines.set(RequestDue(record.request.request_id), record.deadline_ms)

    def overdue(self, record: RequestRecord) -> None:
        """The running clock of a request ran out; the caller revokes what is leased."""
        if record.first_grant_ms is None:
            self.finish(record, Reason.QUEUE_TIMEOUT, "No executor was free in time.")
        else:
            self.finish(record, Reason.EXECUTION_TIMEOUT, "The execution took too long.")

    def _end_of(
        self, record: RequestRecord, reason: Reason | None, message: str
    ) -> RequestFinished:
        def since_accepted(at_ms: int | None) -> int | None:
            return None if at_ms is None else at_ms - record.accepted_ms

        model = record.request.model
        return RequestFinished(
            request_id=record.request.request_id,
            reason=reason,
            message=message,
            queued_ms=since_accepted(record.first_grant_ms),
            first_token_ms=since_accepted(record.first_token_ms),
            total_ms=self.now_ms - record.accepted_ms,
            num_attempts=record.attempt,
            retry_after_ms=self.estimator.retry_after_ms(model) if reason in RETRYABLE else None,
        )

    # --- fleet --------------------------------------------------------------------------

    def new_executor(self, executor_id: str, incarnation: str) -> ExecutorRecord:
        """An executor attached that was not known."""
        self._num_executors += 1
        executor = ExecutorRecord(executor_id, incarnation, self._num_executors)
        self.fleet.executors[executor_id] = executor
        return executor

    def know_models(self, executor: ExecutorRecord) -> None:
        """Remember what was offered, to tell an unknown model from one that is away."""
        for model in sorted(executor.offered_models):
            self.known_models.pop(model, None)
            self.known_models[model] = None
        while len(self.known_models) > self.settings.max_known_models:
            del self.known_models[next(iter(self.known_models))]

    def executor_changed(self, executor: ExecutorRecord) -> None:
        """Slots became free, or an executor began or ceased to serve."""
        if executor.claim is not None and not executor.is_serving:
            self.end_claim(executor.claim.model)
        self.fleet.put(executor)
        for model in executor.resident_models:
            self.wake(model)

    # --- waking -------------------------------------------------------------------------

    def wake(self, model: str) -> None:
        """Have placement try the model's head; a claim of an earlier head ends."""
        head = self.queue.head(model)
        claim = self.fleet.claims.get(model)
        if claim is not None and (head is None or head.request.request_id != claim.request_id):
            self.end_claim(model)
        if head is None:
            self.woken.discard(model)
            self.estimator.backlog_ended(model)
        else:
            self.woken.set(model, head.rank)

    def end_claim(self, model: str) -> None:
        """A model's claim ends: its owner looks again, and whoever it kept out."""
        claim = self.fleet.claims[model]
        self.fleet.drop_claim(claim)
        self.wake(model)
        for other in self.fleet.executors[claim.executor_id].resident_models:
            self.wake(other)
