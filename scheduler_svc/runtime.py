"""The one task that owns the core: mailbox -> handle -> commit -> send.

Rule: everything that a batch of events decided is committed in one transaction before anything
of it is sent. While a commit is on its way the next batch gathers. Nobody else calls
``Scheduler.handle``; queries (``status``, ``snapshot``) are pure and may be asked in between.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from headway.errors import HeadwayError
from headway.v1 import generation_pb2 as generation
from scheduler_svc import translate
from scheduler_svc.actions import Actions
from scheduler_svc.attendance import Attendance
from scheduler_svc.core import answers, messages
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.groups import Groups
from scheduler_svc.mailbox import Mailbox
from scheduler_svc.quotas import Quotas
from scheduler_svc.requests import ExecutorLink, LiveRequest, Requests, Submission
from scheduler_svc.results import Results
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.store.base import AcceptedRecord, FinishedRecord, Store, StoreRecord

_EXPIRE_INTERVAL_MS = 10_000

_log = structlog.get_logger()


def monotonic_ms() -> int:
    """The clock of everything here."""
    return time.monotonic_ns() // 1_000_000


class Runtime:
    """Owns core, mailbox and live requests."""

    def __init__(
        self,
        core: Scheduler,
        store: Store,
        settings: SchedulerSettings,
        *,
        epoch: int,
        clock_ms: Callable[[], int] = monotonic_ms,
    ) -> None:
        self.epoch = epoch
        self.clock_ms = clock_ms
        self.results = Results(store)
        self.groups = Groups(
            first=time.time_ns() // 1_000,  # microseconds: no start ends that many requests
            ttl_ms=settings.result_ttl_ms,
            max_groups=settings.max_groups,
            max_ends=settings.max_group_ends,
        )
        self._quotas = Quotas(
            max_keys=settings.max_quota_keys, busy_retry_ms=settings.retry_after_min_ms
        )
        self._core = core
        self._store = store
        self._settings = settings
        self._mailbox = Mailbox(settings.max_mailbox_events)
        self._is_idle = asyncio.Event()
        self._requests = Requests()
        self._actions = Actions(self._requests, self.results, self._quotas, self.groups, clock_ms)
        self._next_expiry_ms = 0
        self._started_ms = clock_ms()
        self._attendance = Attendance()

    # --- what the shells call

    def post(self, event: messages.Event) -> None:
        """A fact for the core; facts are never refused."""
        self._mailbox.put(event)

    async def room(self) -> None:
        """Awaited by readers before they read on."""
        await self._mailbox.room()

    def submit(self, submission: Submission) -> None:
        """Ask for admission; the sink is answered after the commit, or now where the quota of
        whoever asks is exceeded."""
        if submission.quota is not None:
            try:
                self._quotas.admit(submission.request, submission.quota, self.clock_ms())
            except HeadwayError as error:
                submission.sink.rejected(error)
                return
        self._is_idle.clear()
        self._requests.pending[submission.request.request_id] = submission
        self.post(messages.Submit(submission.request))

    def attach(self, event: messages.ExecutorAttached, link: ExecutorLink) -> None:
        """An executor's session begins."""
        self._actions.links[event.executor_id, event.session] = link
        self.post(event)

    def detach(self, executor_id: str, session: int) -> None:
        """An executor's session is over."""
        if self._actions.links.pop((executor_id, session), None) is not None:
            self.post(messages.ExecutorDisconnected(executor_id, session))

    def find(self, request_id: str, tenant: str) -> LiveRequest | None:
        """A live request of this tenant."""
        live = self._requests.live.get(request_id)
        return live if live is not None and live.tenant == tenant else None

    def cancel(self, live: LiveRequest) -> None:
        """Nobody wants it."""
        live.stop_grace()
        if not live.has_finished:
            self.post(messages.Cancel(live.request_id, live.tenant))

    def abandon(self, live: LiveRequest, grace_ms: int) -> None:
        """A reader is gone: unless somebody else cares, cancel the request after the grace."""
        if live.has_finished or live.is_detached or live.output.followers:
            return
        live.stop_grace()
        if grace_ms == 0:
            self.cancel(live)
        else:
            loop = asyncio.get_running_loop()
            live.grace = loop.call_later(grace_ms / 1_000, self.cancel, live)

    def status(self, live: LiveRequest) -> generation.QueueStatus | None:
        """Where a live request stands; None once its end is committed."""
        if live.has_finished:
            return None
        num_tokens = live.output.num_tokens
        status = self._core.status(live.request_id, self.clock_ms())
        if status is None:  # its end is on the way to the store
            running = generation.QueueStatus.STATE_RUNNING
            return generation.QueueStatus(state=running, num_generated_tokens=num_tokens)
        return translate.status_to_proto(status, num_tokens)

    async def snapshot(self, max_rows: int) -> answers.Snapshot:
        """Queue and fleet, for operators; everything else goes on while it is made."""
        parts = self._core.snapshot_in_parts(self.clock_ms(), max_rows)
        try:
            next(parts)
            while True:
                await asyncio.sleep(0)
                parts.send(self.clock_ms())
        except StopIteration as end:
            found: answers.Snapshot = end.value
            return found

    def executor(self, executor_id: str) -> answers.ExecutorRow | None:
        """One executor, for operators."""
        return self._core.executor(executor_id, self.clock_ms())

    @property
    def uptime_ms(self) -> int:
        """Since it was made."""
        return self.clock_ms() - self._started_ms

    async def idle(self) -> None:
        """Returns when no request is pending or live."""
        self._check_idle()
        await self._is_idle.wait()

    # --- the loop

    async def run(self) -> None:
        """Runs until cancelled; anything it raises is the end of the process."""
        while True:
            await self._wait()
            await self._handle_batch()
            now_ms = self.clock_ms()
            if now_ms >= self._next_expiry_ms:
                self._next_expiry_ms = now_ms + _EXPIRE_INTERVAL_MS
                self.groups.expire(now_ms)
                await self._store.expire()
            await asyncio.sleep(0)

    async def _wait(self) -> None:
        """Until there is mail. When the core's deadline has come, a Tick joins the queue, behind
        what executors said before."""
        now_ms = self.clock_ms()
        deadline_ms, due_ms = self._core.next_deadline_ms(), self._attendance.next_due_ms
        if deadline_ms is not None and deadline_ms <= now_ms:
            self.post(messages.Tick())
        elif due_ms is not None and due_ms <= now_ms:
            self.cancel_abandoned()
        else:
            known = [at_ms for at_ms in (deadline_ms, due_ms) if at_ms is not None]
            await self._mailbox.wait(min(known) - now_ms if known else None)

    def _attend(self, live: LiveRequest) -> None:
        """Watch a future that is to be cancelled once nobody asks for it."""
        live.asked_ms = self.clock_ms()
        if live.is_detached and live.body.HasField("abandon_after"):
            abandon_after_ms = live.body.abandon_after.ToMilliseconds()
            self._attendance.watch(live.request_id, abandon_after_ms, live.asked_ms)

    def cancel_abandoned(self) -> None:
        """Cancel the futures whose time is over; the loop calls it when one may be."""
        now_ms = self.clock_ms()

        def asked_ms(request_id: str) -> int | None:
            live = self._requests.live.get(request_id)
            if live is None:
                return None
            if live.waiters or live.output.followers:
                return now_ms
            group = (live.tenant, live.body.group)
            return max(live.asked_ms, self.groups.asked_ms(group, now_ms))

        for request_id in self._attendance.abandoned(asked_ms, now_ms):
            _log.info("request.abandoned", request_id=request_id)
            self.cancel(self._requests.live[request_id])

    async def _handle_batch(self) -> None:
        now_ms = self.clock_ms()
        records: list[StoreRecord] = []
        results: dict[str, generation.GenerationResult] = {}
        actions: list[messages.Action] = []
        for event in self._mailbox.take(self._settings.max_batch_events):
            effects = self._core.handle(event, now_ms)
            for record in effects.persist:
                records.append(self._to_record(record, results))
            actions.extend(effects.send)
            for decision in effects.decisions:
                _log_decision(decision)
        if records:
            await self._store.commit(records)
        await self._actions.perform(actions, results)
        self._check_idle()

    def _check_idle(self) -> None:
        if not self._requests.live and not self._requests.pending:
            self._is_idle.set()

    def _to_record(
        self, record: messages.Record, results: dict[str, generation.GenerationResult]
    ) -> StoreRecord:
        match record:
            case messages.RequestAdmitted(request):
                live = self._requests.pending[request.request_id].to_live()
                self._requests.live[request.request_id] = live
                self._attend(live)
                return AcceptedRecord(
                    request.request_id,
                    request.tenant,
                    request.idempotency_key,
                    request.body_hash,
                    live.body.SerializeToString(),
                )
            case messages.RequestFinished():
                live = self._requests.live[record.request_id]
                live.output.seal()
                result = translate.result_to_proto(record, live.output, live.body.note)
                results[record.request_id] = result
                return FinishedRecord(record.request_id, live.tenant, result.SerializeToString())


def _log_decision(decision: messages.Decision) -> None:
    _log.info(
        "decision.made",
        kind=decision.kind,
        request_id=decision.request_id,
        model=decision.model,
        text=decision.text,
    )
