"""The state that all policies share, and the few moves that several of them make: effects, wakes
and reservations. What happens to a request is in lifecycle.py.
"""

from collections.abc import Iterable, Sequence

from scheduler_svc.core import counts, priority
from scheduler_svc.core.affinity import PrefixIndex, Sessions
from scheduler_svc.core.deadlines import Deadlines, ModelDue, ReservationDue
from scheduler_svc.core.domain import (
    CoreSettings,
    ExecutorRecord,
    Failing,
    Lease,
    RequestRecord,
    Reservation,
    Why,
)
from scheduler_svc.core.estimate import Estimator
from scheduler_svc.core.fleet import Fleet
from scheduler_svc.core.idempotency import IdempotencyKeys
from scheduler_svc.core.live import LiveRequests
from scheduler_svc.core.messages import (
    Action,
    Decision,
    Effects,
    Record,
    Request,
)
from scheduler_svc.core.queue import Queue
from scheduler_svc.core.stats import Waits
from scheduler_svc.core.totals import Totals
from scheduler_svc.core.waking import OWED, Waking


class State:
    """Everything the scheduler knows, and the effects of the event in hand."""

    def __init__(self, settings: CoreSettings, epoch: int) -> None:
        self.settings = settings
        self.epoch = epoch
        # when the event in hand happened; never goes back
        self.now_ms = 0
        self.is_closing = False
        # the live ones: at most max_inflight; and how many, no zeros
        self.requests = LiveRequests()
        self.num_live_by_tenant: dict[str, int] = {}
        self.num_live_by_model: dict[str, int] = {}
        # leases in the books of executors; only of models that have some
        self.num_leased_by_model: dict[str, int] = {}
        # ever offered, oldest first; at most max_known_models unless more are offered or live
        self.known_models: dict[str, None] = {}
        # known models of which a load failed, and none worked since (failing.py)
        self.failing: dict[str, Failing] = {}
        self.queue = Queue(settings)
        self.fleet = Fleet(self.queue.num_by_model)
        self.keys = IdempotencyKeys(settings)
        self.deadlines = Deadlines()
        self.estimator = Estimator(settings, self.queue, self.fleet)
        # what was decided how often; a fixed set of names
        self.decisions: dict[str, int] = {}
        self.waking = Waking(settings, self.queue, self.fleet, self.estimator)
        self.sessions = Sessions(settings.session_ttl_ms, settings.max_sessions)
        self.prefixes = PrefixIndex(settings.max_prefix_blocks)
        self.waits = Waits(settings.max_wait_samples)
        self.totals = Totals()
        # model -> reservations that it made in the event in hand
        self.num_reserved: dict[str, int] = {}
        # an executor that a lease's end gave slots back to, for which nobody was woken yet
        self.freed: ExecutorRecord | None = None
        # of whoever came last
        self.last_arrival = 0
        self._num_executors = 0
        self._persist: list[Record] = []
        self._send: list[Action] = []
        self._decided: list[Decision] = []

    # --- effects ------------------------------------------------------------------------

    def send(self, action: Action) -> None:
        """Tell somebody."""
        self._send.append(action)

    def record(self, record: Record) -> None:
        """Persist something, then tell."""
        self._persist.append(record)
        self._send.append(record)

    def count(self, name: str) -> None:
        """Something was decided once more."""
        self.decisions[name] = self.decisions.get(name, 0) + 1

    def decide(self, kind: str, head: RequestRecord, text: str) -> None:
        """Say why, for the log; only with has_decision_log."""
        request = head.request
        self._decided.append(Decision(kind, request.request_id, request.model, text))

    def refuse(self, request: Request, text: str) -> None:
        """Say why a request was refused, for the log."""
        self._decided.append(Decision("reject", request.request_id, request.model, text))

    def take_effects(self) -> Effects:
        """What the event in hand led to."""
        if self.fleet.moved:
            self._note_moved()
        if self.num_reserved:
            self.num_reserved.clear()
        decided: Sequence[Decision] = ()
        if self._decided:
            decided, self._decided = self._decided, []
        if not self._send:
            return Effects((), (), decided)
        effects = Effects(self._persist, self._send, decided)
        self._persist, self._send = [], []
        return effects

    # --- requests -----------------------------------------------------------------------

    def next_arrival(self) -> int:
        """The arrival number of whoever comes next."""
        return priority.arrival_number(self.last_arrival, self.now_ms)

    def owner(self, lease: Lease) -> RequestRecord | None:
        """The live request that this lease speaks for; None if it ended or has another lease."""
        record = self.requests.get(lease.key[0])
        return record if record is not None and record.lease is lease else None

    def retry_after_ms(self, model: str) -> int:
        """When one more request for a known model may fare better."""
        failing = self.failing.get(model)
        if failing is not None and failing.refused_until_ms > self.now_ms:
            return self.estimator.clamp(failing.refused_until_ms - self.now_ms)
        return self.estimator.retry_after_ms(model, self.now_ms)

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
            self.totals.moved(model, model in self.fleet.homes, self.now_ms)
        self._forget_models()

    def _forget_models(self) -> None:
        """Make room, oldest first, of models that nobody offers and nobody waits for or runs."""
        excess = len(self.known_models) - self.settings.max_known_models
        if excess <= 0:
            return
        idle = [
            model
            for model in self.known_models
            if not self.fleet.offer(model).groups and model not in self.num_live_by_model
        ]
        for model in idle[:excess]:
            del self.known_models[model]
            self.failing.pop(model, None)
            self.totals.forget(model)
            self.estimator.forget(model)

    def _note_moved(self) -> None:
        """Models got a first home or lost their last one."""
        for model in self.fleet.moved & self.known_models.keys():
            self.totals.moved(model, model in self.fleet.homes, self.now_ms)
        self.fleet.moved.clear()

    def slots_changed(self, executor: ExecutorRecord) -> None:
        """Slots were taken or given back."""
        self.fleet.put(executor)
        executor.activity.note(executor.num_used, executor.num_slots, self.now_ms)

    def executor_changed(self, executor: ExecutorRecord) -> None:
        """Slots became free, models came or went, or it began or ceased to serve."""
        if executor.reservation is not None and not executor.is_serving:
            self.end_reservation(executor.reservation.model, "executor away")
        self.slots_changed(executor)
        self.wake_users(executor)
        if executor.loading is not None:
            self.waking.wake(executor.loading.model)
        if executor.is_serving and not executor.is_roomy:
            self.waking.wake_nowhere(executor)

    def wake_users(self, executor: ExecutorRecord) -> None:
        """Whoever may be granted on an executor, or loaded there, is tried."""
        self.waking.contested = executor
        for model in executor.residences:
            self.waking.wake(model)
        if executor.is_roomy:
            self.waking.wake_waiting(executor)

    # --- queue and limits ---------------------------------------------------------------

    def is_at_limit(self, model: str) -> bool:
        """As many leases of the model run as may in the whole fleet."""
        limit = self.settings.model_limits.get(model)
        return limit is not None and self.num_leased_by_model.get(model, 0) >= limit

    def at_limit(self, models: Iterable[str]) -> list[str]:
        """Those of which no more leases may run."""
        return [model for model in models if self.is_at_limit(model)]

    def head_changed(self, model: str) -> None:
        """Somebody joined or left the queue of a model."""
        reservation = self.fleet.reservations.get(model)
        head = self.queue.head(model)
        if head is not None:
            if reservation is not None and reservation.why is Why.WIDE:
                self._review_claim(reservation)
            self.waking.forget(model)
            self.waking.wake(model)
            return
        self.waking.forget(model)
        if reservation is not None:
            self.end_reservation(model, "nobody waits")
        self.estimator.backlog_ended(model)
        self.deadlines.discard(ModelDue(model))
        self.fleet.unwanted(model)
        self.waking.wake_instead(model)

    # --- reservations -------------------------------------------------------------------

    def _review_claim(self, claim: Reservation) -> None:
        """Its head may be the head no longer, or rank lower: the age behind it is gone."""
        claimant = self.requests.get(claim.request_id)
        if claimant is None or not self.queue.is_head(claimant):
            self.end_reservation(claim.model, "head changed")
        elif claim.rank[0] != OWED and claim.rank < (rank := self.waking.rank(claimant)):
            claim.rank = rank
            for other in self.fleet.executors[claim.executor_id].residences:
                self.waking.wake(other)

    def reserve(
        self,
        executor: ExecutorRecord,
        head: RequestRecord,
        why: Why,
        deadline_ms: int,
        num_kept: int,
        expected_ms: int,
        text: str = "",
    ) -> None:
        """Enter a reservation; the model and the executor must have none. ``text``: for the log."""
        model = head.request.model
        assert model not in self.fleet.reservations
        assert executor.reservation is None
        reservation = Reservation(
            executor.executor_id,
            model,
            why,
            head.request.request_id,
            self.waking.rank(head),
            self.now_ms,
            deadline_ms,
            num_kept,
            expected_ms,
        )
        self._put_reservation(executor, reservation, reservation)
        counts.change(self.num_reserved, model, 1)
        self.deadlines.set(ReservationDue(model), deadline_ms)
        for other in executor.residences:
            if not self.fleet.warmth(other):  # it lost its home, and may find another place
                self.waking.wake(other)
        self.count(f"reserved.{why}")
        if self.settings.has_decision_log:
            self.decide("reserve", head, text or f"{why} on {executor.executor_id}")

    def end_reservation(self, model: str, why: str) -> None:
        """A model's reservation ends: its owner looks again, and whoever it kept out."""
        reservation = self.fleet.reservations[model]
        executor = self.fleet.executors[reservation.executor_id]
        self._put_reservation(executor, reservation, None)
        self.deadlines.discard(ReservationDue(model))
        if self.settings.has_decision_log:
            text = f"{reservation.why} on {executor.executor_id}: {why}"
            self._decided.append(Decision("release", reservation.request_id, model, text))
        self.waking.wake(model)
        for other in executor.residences:
            self.waking.wake(other)
        self.waking.wake_waiting(executor)

    def owed_changed(self, executor: ExecutorRecord) -> None:
        """A claim that ranks before everybody, because its band is owed a grant there, ends when
        that is so no longer."""
        reservation = executor.reservation
        if reservation is not None and reservation.rank[0] == OWED:
            claimant = self.requests.get(reservation.request_id)
            if claimant is None or claimant.request.band != executor.owed_band:
                self.end_reservation(reservation.model, "owed no longer")

    def _put_reservation(
        self, executor: ExecutorRecord, reservation: Reservation, now: Reservation | None
    ) -> None:
        """Enter or strike; one that keeps no slots changes no index."""
        if reservation.num_kept:
            self.fleet.leave(executor)
        executor.reservation = now
        if now is None:
            del self.fleet.reservations[reservation.model]
        else:
            self.fleet.reservations[reservation.model] = now
        if reservation.num_kept:
            self.fleet.enter(executor)
