"""The executor's side of the attach protocol: leases, their tokens, and what the scheduler knows.

Rule: a lease is here from its grant until the scheduler acknowledges its end; between the two its
tokens are kept, at most max_tokens for each sample, and a cursor says how many of them went out
on the present stream. So a report is whatever lies behind the cursors: steps that were made while
a write was under way merge by themselves, and sending again after an adoption is moving cursors
back. Nothing else is buffered. Models come and go by residents.py; a lease is taken only while its
model is on the device, and a model leaves only while no lease runs on it.

Names: the engine knows a lease by its key (never reused), the stream by its handle (new on each
stream), the scheduler by (request id, epoch, attempt). A request has at most one lease here.
"""

from collections.abc import Iterable

from executor_svc.core.engine import LeaseRequest, ModelInfo, StepOutput
from executor_svc.core.intake import take_output
from executor_svc.core.leases import Lease, Sample, find_fault, new_sample, num_slots_of
from executor_svc.core.messages import (
    AbortLease,
    Adopt,
    Disconnected,
    DrainExpired,
    DrainStarted,
    Effect,
    Event,
    Failure,
    Grant,
    Heartbeat,
    HeldLease,
    LeaseEnded,
    LeaseRef,
    LeaseRefused,
    LoadModel,
    LoadOrder,
    ModelLoaded,
    ModelLoadFailed,
    OrdersReceived,
    Outcome,
    Report,
    StartLease,
    StepDone,
    Tick,
    Welcomed,
)
from executor_svc.core.outbox import Outbox
from executor_svc.core.residents import Residents
from headway.reasons import Reason

NUM_HANDLES = 1 << 32  # handles travel as uint32


class Session:
    """One for the life of the process, whatever streams come and go."""

    def __init__(
        self,
        models: tuple[ModelInfo, ...],
        *,
        num_slots: int,
        max_models: int,
        max_leases: int,
        max_report_tokens: int,
    ) -> None:
        assert num_slots > 0
        assert max_leases > 0
        assert max_report_tokens > 0
        self._residents = Residents(models, max_models)
        self._own_slots = num_slots
        self._max_leases = max_leases
        self._max_report_tokens = max_report_tokens
        self._leases: dict[str, Lease] = {}  # by request id; at most max_leases
        self._running: dict[int, Lease] = {}  # by key; what the engine holds
        self._open: dict[int, Sample] = {}  # by key; samples of running leases without an end
        self._next_key = 0
        self._orphan_grace_ms = 0
        self._is_draining = False
        self.orphan_deadline_ms: int | None = None  # set while a stream is missing
        # Of this stream:
        self.is_attached = False
        self._outbox = Outbox()
        self._is_capacity_due = False
        self._next_handle = 0  # handles below are used
        self._last_handle = 0
        self._effects: list[Effect] = []

    # --- what the scheduler is told ---------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """Sequences that the scheduler may place here."""
        return 0 if self._is_draining else self._own_slots

    @property
    def is_idle(self) -> bool:
        """Nothing is held and nothing is left to say."""
        is_silent = not (self._outbox.answers or (self.is_attached and self._is_capacity_due))
        return is_silent and not self._leases

    @property
    def is_drained(self) -> bool:
        """The drain is over: the process may end."""
        return self._is_draining and self.is_idle

    def hello(self) -> tuple[HeldLease, ...]:
        """The leases to list when a new stream opens."""
        return tuple(
            HeldLease(
                lease.ref,
                lease.model,
                lease.num_slots,
                lease.num_tokens,
                has_ended=lease.outcome is not None,
            )
            for lease in self._leases.values()
        )

    def offers(self) -> tuple[ModelInfo, ...]:
        """The models to list when a new stream opens; what changes from here on is reported."""
        return self._residents.offers()

    def heartbeat(self) -> Heartbeat:
        """To be sent after everything that ``take_report`` has given."""
        return Heartbeat(tuple(lease.handle for lease in self._leases.values()), self._last_handle)

    def take_report(self) -> Report | None:
        """What the scheduler does not know yet, or None; counts as sent on this stream."""
        if not self.is_attached:
            return None
        frame = self._outbox.take_frame(self._max_report_tokens)
        ended = self._outbox.take_ends()
        num_slots = self.num_slots if self._is_capacity_due else None
        self._is_capacity_due = False
        models = self._residents.take_changes()
        if frame.is_empty() and not (ended or models or num_slots is not None):
            return None
        return Report(num_slots, frame, ended, models)

    # --- what happens -----------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        """Take in one event; gives what the engine is to do, in order."""
        match event:
            case StepDone(output):
                self._take_output(output)
            case OrdersReceived():
                self._obey(event)
            case LeaseRefused(key, reason, message):
                self._fail(key, Failure(reason, message))
            case ModelLoaded(model, load_ms, exactness_class):
                self._residents.loaded(model, load_ms, exactness_class)
            case ModelLoadFailed(model, message):
                self._residents.failed(model, message)
            case Welcomed():
                self._welcome(event)
            case Disconnected():
                if self.is_attached:
                    self.orphan_deadline_ms = now_ms + self._orphan_grace_ms
                self.is_attached = False
                # The next hello settles these: it does not list the leases.
                self._outbox.answers.clear()
            case Tick():
                if self.orphan_deadline_ms is not None and now_ms >= self.orphan_deadline_ms:
                    self.orphan_deadline_ms = None
                    self._forget(list(self._leases.values()))
            case DrainStarted():
                self._is_capacity_due |= not self._is_draining
                self._is_draining = True
            case DrainExpired():
                for lease in list(self._running.values()):
                    self._stop(lease, Outcome.RETURNED)
        effects, self._effects = self._effects, []
        return effects

    def _take_output(self, output: StepOutput) -> None:
        for lease in take_output(output, self._running, self._open, self._outbox):
            self._finish(lease, Outcome.COMPLETED)
        for failure in output.failures:
            message = failure.message or "The executor could not go on."
            self._fail(failure.key, Failure(failure.reason, message))

    def _obey(self, orders: OrdersReceived) -> None:
        for grant in orders.grants:
            self._grant(grant)
        for ref in orders.acknowledged:
            lease = self._find(ref)
            if lease is not None:
                self._forget([lease])
        for ref in orders.revokes:
            lease = self._find(ref)
            if lease is None:
                self._outbox.answers.append(LeaseEnded(ref, Outcome.UNKNOWN))
            elif lease.outcome is None:
                self._stop(lease, Outcome.REVOKED)
                self._outbox.drop_tokens(lease)  # nobody wants the rest
        for load in orders.loads:
            self._load(load)

    def _load(self, load: LoadOrder) -> None:
        if self._is_draining:
            self._residents.refuse(load, "the executor shuts down")
            return
        busy = {lease.model for lease in self._running.values()}
        if self._residents.order(load, busy):
            self._effects.append(LoadModel(load.model, load.evict))

    def _grant(self, grant: Grant) -> None:
        ref = grant.ref
        known = self._leases.get(ref.request_id)
        if known is not None and ref == known.ref:
            return  # said twice: it runs already
        if known is not None and ref.fence < known.ref.fence:
            self._refuse(ref, Reason.STALE_LEASE, "A newer grant of the request runs here.")
            return
        next_handle = grant.handle + max(1, grant.num_samples)
        if grant.handle < self._next_handle or next_handle > NUM_HANDLES:
            self._refuse(ref, Reason.INTERNAL, "The scheduler chose a handle that is not free.")
            return
        self._next_handle, self._last_handle = next_handle, grant.handle
        if known is not None:
            self._replace(known)
        if self._is_draining or len(self._leases) >= self._max_leases:
            self._outbox.answers.append(LeaseEnded(ref, Outcome.RETURNED))
            return
        if not self._residents.can_take(grant.model):
            self._outbox.answers.append(LeaseEnded(ref, Outcome.RETURNED))
            self._residents.tell_absent(grant.model)
            return
        fault = find_fault(grant)
        num_slots = num_slots_of(grant, self._own_slots)
        lease = Lease(ref, grant.model, num_slots, grant.handle, self._next_key, [], 0)
        lease.are_scores_elsewhere = grant.scoring is not None and grant.has_prompt_scores
        self._leases[ref.request_id] = lease
        if fault is not None:
            self._next_key += 1
            self._finish(lease, Outcome.FAILED, Failure(Reason.INVALID_REQUEST, fault))
            return
        self._next_key += grant.num_samples
        self._start(lease, grant)

    def _start(self, lease: Lease, grant: Grant) -> None:
        for number in range(grant.num_samples):
            sample = new_sample(lease, number, grant)
            lease.samples.append(sample)
            if sample.end is None:
                self._open[lease.key + number] = sample
                lease.num_open += 1
        if not lease.num_open:
            self._finish(lease, Outcome.COMPLETED)
            return
        self._running[lease.key] = lease
        request = LeaseRequest(
            key=lease.key,
            model=grant.model,
            prompt_token_ids=grant.prompt_token_ids,
            params=grant.params,
            num_samples=grant.num_samples,
            generated=tuple(sample.token_ids for sample in grant.generated),
            ended=frozenset(s.number for s in lease.samples if s.end is not None),
            scoring=None if grant.has_prompt_scores else grant.scoring,
            cache_salt=grant.cache_salt,
        )
        self._effects.append(StartLease(request))

    def _welcome(self, welcome: Welcomed) -> None:
        self._orphan_grace_ms = welcome.orphan_grace_ms
        self.orphan_deadline_ms = None
        self.is_attached = True
        self._is_capacity_due = self._is_draining  # hello may be older
        self._outbox = Outbox()
        self._next_handle = self._last_handle = 0
        adopted = set()
        for adopt in sorted(welcome.adopts, key=lambda adopt: adopt.handle):
            lease = self._find(adopt.held)
            if lease is None or not self._can_adopt(lease, adopt):
                self._outbox.answers.append(LeaseEnded(adopt.ref, Outcome.UNKNOWN))
                continue
            adopted.add(adopt.held.request_id)
            self._adopt(lease, adopt)
        self._forget(
            [lease for name, lease in self._leases.items() if name not in adopted],
        )

    def _can_adopt(self, lease: Lease, adopt: Adopt) -> bool:
        """Whether the scheduler's idea of the lease fits to what is here."""
        if lease.ref.request_id != adopt.ref.request_id or adopt.handle < self._next_handle:
            return False
        if not lease.samples:  # refused at the door: only its end is wanted
            return True
        if lease.are_scores_elsewhere and not adopt.has_prompt_scores:  # the scheduler lost them
            return False
        return (
            adopt.handle + len(lease.samples) <= NUM_HANDLES
            and len(adopt.next_index) == len(lease.samples)
            and all(n <= m for n, m in zip(adopt.next_index, lease.num_tokens, strict=True))
        )

    def _adopt(self, lease: Lease, adopt: Adopt) -> None:
        lease.ref, lease.handle = adopt.ref, adopt.handle
        self._last_handle = adopt.handle
        self._next_handle = adopt.handle + max(1, len(lease.samples))
        if lease.samples:
            for sample, next_index in zip(lease.samples, adopt.next_index, strict=True):
                self._outbox.rewind(sample, next_index)
        if lease.scores is not None and not adopt.has_prompt_scores:
            self._outbox.scored[lease.key] = lease
        if lease.outcome is not None:
            self._outbox.ending[adopt.ref.request_id] = lease

    # --- how leases end ---------------------------------------------------------------------

    def _find(self, ref: LeaseRef) -> Lease | None:
        lease = self._leases.get(ref.request_id)
        return lease if lease is not None and lease.ref == ref else None

    def _refuse(self, ref: LeaseRef, reason: Reason, message: str) -> None:
        self._outbox.answers.append(LeaseEnded(ref, Outcome.FAILED, (), Failure(reason, message)))

    def _fail(self, key: int, failure: Failure) -> None:
        """The engine gave the lease up; it has forgotten the key already."""
        lease = self._running.get(key)
        if lease is not None:
            self._finish(lease, Outcome.FAILED, failure)

    def _stop(self, lease: Lease, outcome: Outcome) -> None:
        """End a running lease from outside."""
        self._effects.append(AbortLease(lease.key))
        self._finish(lease, outcome)

    def _finish(self, lease: Lease, outcome: Outcome, failure: Failure | None = None) -> None:
        assert lease.outcome is None, "a lease ends once"
        lease.outcome, lease.failure = outcome, failure
        self._outbox.ending[lease.ref.request_id] = lease
        self._unlist(lease)

    def _replace(self, lease: Lease) -> None:
        """A newer grant takes the request's place; the old one still gets its last word."""
        if lease.outcome is None or lease.ref.request_id in self._outbox.ending:
            # Its tokens are not all sent, so it cannot be called completed.
            self._outbox.answers.append(LeaseEnded(lease.ref, Outcome.REVOKED, lease.num_tokens))
        self._forget([lease])

    def _forget(self, leases: Iterable[Lease]) -> None:
        """Drop leases without a word, running or not."""
        for lease in leases:
            if lease.outcome is None:
                self._effects.append(AbortLease(lease.key))
            self._unlist(lease)
            self._outbox.forget(lease)
            del self._leases[lease.ref.request_id]

    def _unlist(self, lease: Lease) -> None:
        """The engine no longer works on it."""
        self._running.pop(lease.key, None)
        for sample in lease.samples:
            self._open.pop(sample.key, None)
