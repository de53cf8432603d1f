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
from headway.v1 import generation_pb2 as generation
from scheduler_svc import fleet_translate, translate
from scheduler_svc.catalog import Catalog
from scheduler_svc.core import messages
from scheduler_svc.lease_news import LeaseNews
from scheduler_svc.outbox import Outbox
from scheduler_svc.progress import Progress, Stalled
from scheduler_svc.relay import Routes
from scheduler_svc.requests import LiveRequest
from scheduler_svc.routes import Lease
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
        self._stalled = Stalled(pulse.settings.max_executors)
        self._attached: dict[str, ExecutorSession] = {}  # by executor, the latest one

    async def Attach(  # noqa: N802
        self,
        request_iterator: AsyncIterator[fleet.AttachRequest],
        context: Context,
    ) -> AsyncIterator[fleet.AttachResponse]:
        """See fleet.proto."""
        self._places.take(context)
        session = ExecutorSession(
            next(self._sessions),
            self._runtime,
            self._catalog,
            self._pulse,
            self._stalled,
            self._attached,
        )
        async for response in session.run(request_iterator, context):
            yield response


class ExecutorSession(PeerStream[fleet.AttachRequest, fleet.AttachResponse]):
    """One Attach stream; the ExecutorLink of its executor."""

    def __init__(
        self,
        session: int,
        runtime: Runtime,
        catalog: Catalog,
        pulse: Pulse,
        stalled: Stalled,
        attached: "dict[str, ExecutorSession]",
    ) -> None:
        super().__init__(pulse)
        self._session = session
        self._runtime = runtime
        self._catalog = catalog
        self._settings = pulse.settings
        self._routes = Routes(runtime.epoch)
        self._stalled = stalled
        self._attached = attached
        self._progress = Progress(self._settings.stall_timeout_ms)
        self._leases: LeaseNews  # from hello on
        self._executor_id = ""
        self._incarnation = ""
        self._exactness_classes: dict[str, str] = {}  # of the models that are offered
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
            self._on_heartbeat(message.heartbeat)
        await self._runtime.room()

    def _on_hello(self, hello: fleet.ExecutorHello) -> None:
        event = fleet_translate.attached(hello, self._session, self._settings)
        if self._stalled.has(hello.executor_id, hello.incarnation):
            raise fleet_translate.out_of_turn("the engine of this process stalled: start it anew")
        self._check_name(hello)
        self._catalog.attach(hello.executor_id, self._session, hello.models)
        self._executor_id = hello.executor_id
        self._incarnation = hello.incarnation
        self._attached[hello.executor_id] = self
        self._leases = LeaseNews(
            self._executor_id, self._session, self._routes, self._settings, self._runtime.post
        )
        self._exactness_classes = {offer.card.name: offer.exactness_class for offer in hello.models}
        for offer in hello.models:
            if offer.loading:
                self._progress.load_began(offer.card.name)
        self._runtime.attach(event, self)

    def _check_name(self, hello: fleet.ExecutorHello) -> None:
        """One process for each name: a twin would take the place of the first, which would take it
        back, and all that either runs is lost each time. A process that follows a dead one comes in
        as soon as that one's stream has ended, at the latest after heartbeat_timeout_ms."""
        other = self._attached.get(hello.executor_id)
        if other is not None and other._incarnation != hello.incarnation:
            _log.warning("executor.refused", executor_id=hello.executor_id, cause="name is taken")
            message = "Another process is attached under this executor_id."
            raise HeadwayError(Reason.STALE_LEASE, message)

    def _on_heartbeat(self, heartbeat: fleet.ExecutorHeartbeat) -> None:
        fleet_translate.check_leases(heartbeat.handles)
        for lease in self._routes.lost(heartbeat):
            self._leases.lost(lease)
        if self._progress.is_stalled(
            heartbeat.num_steps,
            has_leases=self._routes.has_leases(),
            now_ms=self._pulse.clock_ms(),
        ):
            _log.error(
                "executor.stalled",
                executor_id=self._executor_id,
                num_steps=heartbeat.num_steps,
                num_leases=len(heartbeat.handles),
                stall_timeout_ms=self._settings.stall_timeout_ms,
            )
            self._stalled.add(self._executor_id, self._incarnation)
            raise fleet_translate.out_of_turn("the engine makes no steps")

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
                self._leases.started(lease)
            for lease, message in news.faults.items():
                self._leases.faulted(lease, message)
                self._outbox.orders().revokes.append(lease.ref())
                self.wake()
        fleet_translate.check_leases(report.ended)
        for ended in report.ended:
            self._leases.ended(ended)
        for offered in report.assets:
            self._catalog.put_assets(
                self._executor_id, self._session, offered.model, offered.assets
            )
        for change in report.models:
            self._on_model_change(change)

    def _on_model_change(self, change: fleet.ModelChange) -> None:
        if change.model not in self._exactness_classes:
            raise fleet_translate.out_of_turn("a model changes that hello did not offer")
        event = fleet_translate.model_changed(change, self._executor_id, self._session)
        if event.state is not messages.ModelState.ABSENT:
            self._progress.model_changed(event.model)
        if event.state is messages.ModelState.RESIDENT:
            self._exactness_classes[event.model] = change.exactness_class
        _log.log(
            logging.WARNING if event.state is messages.ModelState.FAILED else logging.INFO,
            "model.changed",
            executor_id=self._executor_id,
            model=event.model,
            state=event.state,
            load_ms=event.load_ms,
            message=fleet_translate.words(change),
        )
        self._runtime.post(event)

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
        lease = self._open(live, attempt, takes_over=live.output.num_tokens > 0)
        generated = live.output.samples() if live.output.num_tokens else ()
        num_bytes = live.body.ByteSize() + sum(sample.ByteSize() for sample in generated)
        self._outbox.orders_for_grant(num_bytes).grants.add(
            lease=lease.ref(),
            handle=lease.handle,
            request=_for_executor(live.body),
            generated=generated,
            has_prompt_scores=live.output.prompt_scores is not None,
        )
        self.wake()

    def adopt(self, live: LiveRequest, effect: messages.LeaseAdopted) -> None:
        """See ExecutorLink."""
        assert self._outbox.welcome is not None, "adopts are part of the welcome"
        lease = self._open(live, effect.attempt, takes_over=False)
        self._outbox.welcome.adopts.add(
            held=_ref(effect.request_id, effect.held_epoch, effect.held_attempt),
            lease=lease.ref(),
            handle=lease.handle,
            next_index=map(len, live.output.token_ids),
            has_prompt_scores=live.output.prompt_scores is not None,
        )

    def _open(self, live: LiveRequest, attempt: int, *, takes_over: bool) -> Lease:
        output = live.output
        output.attempts.begin(
            self._executor_id,
            self._exactness_classes.get(live.body.model, ""),
            takes_over=takes_over,
        )
        return self._routes.open(output, attempt)

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
        self.wake_within(self._settings.ack_linger_ms)

    def load(self, effect: messages.ModelLoadOrdered) -> None:
        """See ExecutorLink."""
        self._progress.load_began(effect.model)
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
            if self._attached.get(self._executor_id) is self:
                del self._attached[self._executor_id]
            self._catalog.detach(self._executor_id, self._session)
            self._runtime.detach(self._executor_id, self._session)


def _ref(request_id: str, epoch: int, attempt: int) -> fleet.LeaseRef:
    return fleet.LeaseRef(request_id=request_id, epoch=epoch, attempt=attempt)


def _for_executor(body: generation.GenerationRequest) -> generation.GenerationRequest:
    """Without what is between client and scheduler."""
    if not body.note:
        return body
    bare = generation.GenerationRequest()
    bare.CopyFrom(body)
    bare.ClearField("note")
    return bare
