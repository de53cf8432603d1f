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
from scheduler_svc import fleet_translate, translate
from scheduler_svc.catalog import Catalog
from scheduler_svc.core import messages
from scheduler_svc.outbox import Outbox
from scheduler_svc.relay import Lease, Routes
from scheduler_svc.requests import LiveRequest
from scheduler_svc.runtime import Runtime
from scheduler_svc.streams import Context, PeerStream, Places, Pulse

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
        self._places.take(context)
        session = ExecutorSession(next(self._sessions), self._runtime, self._catalog, self._pulse)
        async for response in session.run(request_iterator, context):
            yield response


class ExecutorSession(PeerStream[fleet.AttachRequest, fleet.AttachResponse]):
    """One Attach stream; the ExecutorLink of its executor."""

    def __init__(self, session: int, runtime: Runtime, catalog: Catalog, pulse: Pulse) -> None:
        super().__init__(pulse)
        self._session = session
        self._runtime = runtime
        self._catalog = catalog
        self._settings = pulse.settings
        self._routes = Routes(runtime.epoch)
        self._executor_id = ""
        self._offered: frozenset[str] = frozenset()
        self._outbox = Outbox(self._settings.max_orders_bytes)

    # --- from the executor

    async def on_message(self, message: fleet.AttachRequest) -> None:
        """See PeerStream."""
        kind = message.WhichOneof("message")
        if (kind == "hello") == bool(self._executor_id) or kind is None:
            raise fleet_translate.out_of_turn("the first message is hello, and only the first")
        if kind == "hello":
            self._on_hello(message.hello)
            return
        if kind == "report":
            self._on_report(message.report)
        else:
            fleet_translate.check_leases(message.heartbeat.handles)
            for lease in self._routes.lost(message.heartbeat):
                self._routes.close(lease)
                self._post_lost(lease)
        await self._runtime.room()

    def _on_hello(self, hello: fleet.ExecutorHello) -> None:
        event = fleet_translate.attached(hello, self._session, self._settings)
        self._catalog.attach(hello.executor_id, self._session, hello.models)
        self._executor_id = hello.executor_id
        self._offered = frozenset(offer.card.name for offer in hello.models)
        self._runtime.attach(event, self)

    def _on_report(self, report: fleet.ExecutorReport) -> None:
        if report.HasField("capacity"):
            fleet_translate.check_capacity(report.capacity, self._settings)
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
        fleet_translate.check_leases(report.ended)
        for ended in report.ended:
            self._on_lease_ended(ended)
        for offered in report.assets:
            self._catalog.put_assets(
                self._executor_id, self._session, offered.model, offered.assets
            )
        for change in report.models:
            self._on_model_change(change)

    def _on_model_change(self, change: fleet.ModelChange) -> None:
        if change.model not in self._offered:
            raise fleet_translate.out_of_turn("a model changes that hello did not offer")
        event = fleet_translate.model_changed(change, self._executor_id, self._session)
        _log.log(
            logging.WARNING if event.state is messages.ModelState.FAILED else logging.INFO,
            "model.changed",
            executor_id=self._executor_id,
            model=event.model,
            state=event.state,
            load_ms=event.load_ms,
            message=event.message,
        )
        self._runtime.post(event)

    def _on_fault(self, lease: Lease, message: str) -> None:
        """What came contradicts what clients may have seen: another attempt has to go on."""
        self._log_fault(lease, message)
        self._outbox.orders().revokes.append(lease.ref())
        self._post_lost(lease)
        self.wake()

    def _on_lease_ended(self, ended: fleet.LeaseEnded) -> None:
        outcome = fleet_translate.outcome(ended, self._settings)
        ref = ended.lease
        lease = self._routes.find(ref)
        reason, message, num_tokens = None, "", 0
        if outcome is messages.LeaseOutcome.FAILED:
            reason, message = fleet_translate.failure(ended)
            if reason is Reason.INTERNAL:
                self._log_failure(ended)
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
                # a muted one is over for us: its last tokens were dropped on purpose
                if lease is not None and not lease.is_muted:
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

    def _log_failure(self, ended: fleet.LeaseEnded) -> None:
        _log.error(
            "lease.failed",
            executor_id=self._executor_id,
            request_id=ended.lease.request_id,
            attempt=ended.lease.attempt,
            message=fleet_translate.words(ended),
        )

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
        if not self._routes.has_room(live.output):
            # attached again it starts from 1; until then the core takes the lease for lost
            self.close(HeadwayError(Reason.STALE_LEASE, "This session's handles are used up."))
            return
        lease = self._routes.open(live.output, attempt)
        generated = live.output.samples() if live.output.num_tokens else ()
        num_bytes = live.body.ByteSize() + sum(sample.ByteSize() for sample in generated)
        self._outbox.orders_for_grant(num_bytes).grants.add(
            lease=lease.ref(), handle=lease.handle, request=live.body, generated=generated
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
        self._outbox.orders().revokes.append(ref)
        self.wake()

    def acknowledge(self, effect: messages.LeaseAcknowledged) -> None:
        """See ExecutorLink."""
        self._outbox.orders().acknowledged.add(
            request_id=effect.request_id, epoch=effect.epoch, attempt=effect.attempt
        )
        self.wake()

    def load(self, effect: messages.ModelLoadOrdered) -> None:
        """See ExecutorLink."""
        self._outbox.orders().loads.add(model=effect.model, evict=effect.evict)
        self.wake()

    # --- the stream

    def take(self) -> fleet.AttachResponse | None:
        """See PeerStream."""
        return self._outbox.take()

    def num_answers(self) -> int:
        """See PeerStream."""
        return self._outbox.num_answers

    def heartbeat(self) -> fleet.AttachResponse | None:
        """See PeerStream."""
        if not self._outbox.has_welcomed:
            return None
        return fleet.AttachResponse(heartbeat=fleet.SchedulerHeartbeat())

    def on_end(self) -> None:
        """See PeerStream."""
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
