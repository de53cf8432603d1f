"""FleetService: one session for each executor that dials in.

A session translates between the stream and the core's events and effects; what it knows by itself
is only which handles it granted (relay.Routes). Executors are not trusted: whatever they say is
checked here, and a peer that speaks out of turn loses its own stream and nothing else.
"""

import itertools
import logging
from collections.abc import AsyncIterator

import structlog

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import fleet_pb2_grpc
from scheduler_svc import translate
from scheduler_svc.catalog import Catalog
from scheduler_svc.core import messages
from scheduler_svc.outbox import Outbox
from scheduler_svc.relay import Lease, Routes
from scheduler_svc.requests import LiveRequest
from scheduler_svc.runtime import Runtime
from scheduler_svc.streams import Context, PeerStream, Places, Pulse

_MAX_MESSAGE_CHARS = 500
_MAX_HELD_LEASES = 100_000
_MAX_LOAD_MS = 86_400_000

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

_log = structlog.get_logger()


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """The door for executors."""

    def __init__(self, runtime: Runtime, catalog: Catalog, pulse: Pulse) -> None:
        self._runtime = runtime
        self._catalog = catalog
        self._pulse = pulse
        self._places = Places(pulse.settings.max_executors)
        self._sessions = itertools.count(1)

    async def Attach(  # noqa: N802
        self,
        request_iterator: AsyncIterator[fleet.AttachRequest],
        context: Context,
    ) -> AsyncIterator[fleet.AttachResponse]:
        """See fleet.proto."""
        self._places.take()
        session = ExecutorSession(
            next(self._sessions), self._runtime, self._catalog, self._pulse, self._places
        )
        async for response in session.run(request_iterator, context):
            yield response


class ExecutorSession(PeerStream[fleet.AttachRequest, fleet.AttachResponse]):
    """One Attach stream; the ExecutorLink of its executor."""

    def __init__(
        self, session: int, runtime: Runtime, catalog: Catalog, pulse: Pulse, places: Places
    ) -> None:
        super().__init__(pulse)
        self._session = session
        self._runtime = runtime
        self._catalog = catalog
        self._settings = pulse.settings
        self._places = places
        self._routes = Routes(runtime.epoch)
        self._executor_id = ""
        self._offered: frozenset[str] = frozenset()
        self._outbox = Outbox()

    # --- from the executor

    async def on_message(self, message: fleet.AttachRequest) -> None:
        """See PeerStream."""
        kind = message.WhichOneof("message")
        if (kind == "hello") == bool(self._executor_id) or kind is None:
            raise _out_of_turn("the first message is hello, and only the first")
        if kind == "hello":
            self._on_hello(message.hello)
            return
        if kind == "report":
            self._on_report(message.report)
        else:
            for lease in self._routes.lost(message.heartbeat):
                self._routes.close(lease)
                self._post_lost(lease)
        await self._runtime.room()

    def _on_hello(self, hello: fleet.ExecutorHello) -> None:
        most = self._settings.max_name_chars
        translate.check_name(hello.executor_id, "executor_id", most)
        translate.check_name(hello.incarnation, "incarnation", most)
        self._check_capacity(hello.capacity)
        if len(hello.models) > self._settings.max_models_per_executor:
            raise _out_of_turn("too many models are offered")
        if sum(offer.resident for offer in hello.models) > hello.capacity.max_models:
            raise _out_of_turn("more models are resident than capacity.max_models")
        if len(hello.leases) > _MAX_HELD_LEASES:
            raise _out_of_turn("too many leases are listed")
        self._catalog.attach(hello.executor_id, self._session, hello.models)
        self._executor_id = hello.executor_id
        self._offered = frozenset(offer.card.name for offer in hello.models)
        event = messages.ExecutorAttached(
            executor_id=hello.executor_id,
            session=self._session,
            incarnation=hello.incarnation,
            num_slots=hello.capacity.num_slots,
            max_models=hello.capacity.max_models,
            models=tuple(
                messages.ModelOffer(offer.card.name, offer.resident, _load_ms(offer))
                for offer in hello.models
            ),
            held=tuple(
                messages.HeldLease(
                    held.lease.request_id, held.lease.epoch, held.lease.attempt, held.ended
                )
                for held in hello.leases
            ),
        )
        self._runtime.attach(event, self)

    def _on_report(self, report: fleet.ExecutorReport) -> None:
        if report.HasField("capacity"):
            self._check_capacity(report.capacity)
            self._runtime.post(
                messages.ExecutorCapacityChanged(
                    self._executor_id,
                    self._session,
                    report.capacity.num_slots,
                    report.capacity.max_models,
                )
            )
        if report.HasField("frame"):
            news = self._routes.accept_frame(report.frame)
            for lease in news.started:
                self._runtime.post(
                    messages.LeaseStarted(
                        self._executor_id, self._session, lease.request_id, lease.attempt
                    )
                )
            for lease, message in news.faults.items():
                self._on_fault(lease, message)
        for ended in report.ended:
            self._on_lease_ended(ended)
        for offered in report.assets:
            self._catalog.put_assets(
                self._executor_id, self._session, offered.model, offered.assets
            )
        for change in report.models:
            self._on_model_change(change)

    def _on_model_change(self, change: fleet.ModelChange) -> None:
        state = _MODEL_STATES.get(change.state)
        if state is None:
            raise _out_of_turn("a model changes without a state")
        if change.model not in self._offered:
            raise _out_of_turn("a model changes that hello did not offer")
        message = change.failure.message[:_MAX_MESSAGE_CHARS]
        event = messages.ModelChanged(
            self._executor_id, self._session, change.model, state, _load_ms(change), message
        )
        _log.log(
            logging.WARNING if state is messages.ModelState.FAILED else logging.INFO,
            "model.changed",
            executor_id=self._executor_id,
            model=event.model,
            state=state,
            load_ms=event.load_ms,
            message=message,
        )
        self._runtime.post(event)

    def _on_fault(self, lease: Lease, message: str) -> None:
        """What came contradicts what clients may have seen: another attempt has to go on."""
        self._log_fault(lease, message)
        self._outbox.revokes.append(lease.ref())
        self._post_lost(lease)
        self.wake()

    def _on_lease_ended(self, ended: fleet.LeaseEnded) -> None:
        outcome = _OUTCOMES.get(ended.outcome)
        if outcome is None:
            raise _out_of_turn("a lease ends without an outcome")
        ref = ended.lease
        lease = self._routes.find(ref)
        reason, message, num_tokens = None, "", 0
        if outcome is messages.LeaseOutcome.FAILED:
            reason, message = _failure(ended)
        if lease is not None:
            self._routes.close(lease)
            num_tokens = lease.output.num_tokens
        if outcome is messages.LeaseOutcome.COMPLETED:
            fault = "it has ended on this session before"
            if lease is not None:
                fault = self._routes.incomplete(lease, list(ended.num_tokens)) or ""
            if fault:
                outcome, reason = messages.LeaseOutcome.FAILED, Reason.INTERNAL
                message = "The executor's tokens are not complete."
                if lease is not None:
                    self._log_fault(lease, fault)
        self._runtime.post(
            messages.LeaseEnded(
                self._executor_id,
                self._session,
                ref.request_id,
                ref.epoch,
                ref.attempt,
                outcome,
                num_tokens,
                reason,
                message,
            )
        )

    def _post_lost(self, lease: Lease) -> None:
        """The core is to grant the request again."""
        self._runtime.post(
            messages.LeaseEnded(
                self._executor_id,
                self._session,
                lease.request_id,
                lease.epoch,
                lease.attempt,
                messages.LeaseOutcome.UNKNOWN,
                lease.output.num_tokens,
            )
        )

    def _check_capacity(self, capacity: fleet.Capacity) -> None:
        if capacity.num_slots > self._settings.max_slots_per_executor:
            raise _out_of_turn("capacity.num_slots is too large")
        if not 0 < capacity.max_models <= self._settings.max_models_per_executor:
            raise _out_of_turn("capacity.max_models is out of range")

    def _log_fault(self, lease: Lease, message: str) -> None:
        _log.error(
            "lease.faulted",
            executor_id=self._executor_id,
            request_id=lease.request_id,
            attempt=lease.attempt,
            message=message,
        )

    # --- to the executor (ExecutorLink)

    def welcome(self) -> None:
        """See ExecutorLink."""
        settings = self._settings
        self._outbox.welcome = fleet.ExecutorWelcome(
            epoch=self._runtime.epoch,
            heartbeat_interval=translate.duration(settings.heartbeat_interval_ms),
            heartbeat_timeout=translate.duration(settings.heartbeat_timeout_ms),
            orphan_grace=translate.duration(settings.orphan_grace_ms),
            wanted_assets=self._catalog.wanted_assets(self._executor_id, self._session),
        )
        self.wake()

    def grant(self, live: LiveRequest, attempt: int) -> None:
        """See ExecutorLink."""
        lease = self._routes.open(live.output, attempt)
        generated = live.output.samples() if live.output.num_tokens else ()
        self._outbox.grants.append(
            fleet.Grant(
                lease=lease.ref(), handle=lease.handle, request=live.body, generated=generated
            )
        )
        self.wake()

    def adopt(self, live: LiveRequest, effect: messages.LeaseAdopted) -> None:
        """See ExecutorLink."""
        assert self._outbox.welcome is not None, "adopts are part of the welcome"
        lease = self._routes.open(live.output, effect.attempt)
        self._outbox.welcome.adopts.add(
            held=_ref(effect.request_id, effect.held_epoch, effect.held_attempt),
            lease=lease.ref(),
            handle=lease.handle,
            next_index=map(len, live.output.token_ids),
        )

    def revoke(self, effect: messages.LeaseRevoked) -> None:
        """See ExecutorLink."""
        ref = _ref(effect.request_id, effect.epoch, effect.attempt)
        lease = self._routes.find(ref)
        if lease is not None:
            self._routes.mute(lease)
        self._outbox.revokes.append(ref)
        self.wake()

    def acknowledge(self, effect: messages.LeaseAcknowledged) -> None:
        """See ExecutorLink."""
        self._outbox.acknowledged.append(_ref(effect.request_id, effect.epoch, effect.attempt))
        self.wake()

    def load(self, effect: messages.ModelLoadOrdered) -> None:
        """See ExecutorLink."""
        self._outbox.loads.append(fleet.LoadModel(model=effect.model, evict=effect.evict))
        self.wake()

    # --- the stream

    def take(self) -> fleet.AttachResponse | None:
        """See PeerStream."""
        return self._outbox.take(self._settings.max_orders_bytes)

    def heartbeat(self) -> fleet.AttachResponse | None:
        """See PeerStream."""
        if not self._outbox.has_welcomed:
            return None
        return fleet.AttachResponse(heartbeat=fleet.SchedulerHeartbeat())

    def on_end(self) -> None:
        """See PeerStream."""
        self._places.give_back()
        if self._executor_id:
            _log.warning(
                "executor.lost",
                executor_id=self._executor_id,
                session=self._session,
                num_dropped=self._routes.num_dropped,
                error=self._error.message if self._error is not None else None,
            )
            self._catalog.detach(self._executor_id, self._session)
            self._runtime.detach(self._executor_id, self._session)


def _ref(request_id: str, epoch: int, attempt: int) -> fleet.LeaseRef:
    return fleet.LeaseRef(request_id=request_id, epoch=epoch, attempt=attempt)


def _failure(ended: fleet.LeaseEnded) -> tuple[Reason, str]:
    reason = Reason.INTERNAL
    if ended.failure.reason in _FAILURE_REASONS:
        reason = Reason(ended.failure.reason)
    return reason, ended.failure.message[:_MAX_MESSAGE_CHARS] or "The executor failed."


def _load_ms(message: fleet.ModelOffer | fleet.ModelChange) -> int | None:
    if not message.HasField("load_time"):
        return None
    return translate.duration_ms(message.load_time, "load_time", least=0, most=_MAX_LOAD_MS)


def _out_of_turn(message: str) -> HeadwayError:
    return HeadwayError(Reason.INVALID_REQUEST, message)
