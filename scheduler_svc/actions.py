"""Carries out what the core decided, once it is committed: tells executors, then whoever asked.

Executors come first, for a slot that waits for its grant is idle, and whoever waits for an answer
is not. Within each kind the order is the core's. The log says each once.
"""

from collections.abc import Callable, Mapping, Sequence

import structlog

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc.core import messages
from scheduler_svc.groups import Groups
from scheduler_svc.quotas import Quotas
from scheduler_svc.requests import ExecutorLink, LiveRequest, Requests, Submission
from scheduler_svc.results import Results

_Answer = (
    messages.RequestAdmitted
    | messages.RequestDeduplicated
    | messages.RequestRejected
    | messages.RequestFinished
)
_Order = (
    messages.LeaseGranted
    | messages.LeaseAdopted
    | messages.LeaseRevoked
    | messages.LeaseAcknowledged
    | messages.ModelLoadOrdered
    | messages.ExecutorWelcomed
    | messages.SessionClosed
    | messages.ExecutorDrained
)
_NewLease = messages.LeaseGranted | messages.LeaseAdopted

_log = structlog.get_logger()

Ends = Mapping[str, generation.GenerationResult]
"""Results of the requests that end now, by id."""

_Originals = Mapping[str, LiveRequest | HeadwayError]


class Actions:
    """Of one scheduler."""

    def __init__(
        self,
        requests: Requests,
        stored: Results,
        quotas: Quotas,
        groups: Groups,
        clock_ms: Callable[[], int],
    ) -> None:
        self._requests = requests
        self._stored = stored
        self._quotas = quotas
        self._groups = groups
        self._clock_ms = clock_ms
        self.links: dict[tuple[str, int], ExecutorLink] = {}
        """By executor and session."""

    async def perform(self, actions: Sequence[messages.Action], ends: Ends) -> None:
        """Everything of one batch."""
        originals = await self._load_originals(actions)
        # No await below: the answer to an attach leaves as a whole.
        answers: list[_Answer] = []
        for action in actions:
            if isinstance(action, _Answer):
                answers.append(action)
            else:
                self._order(action)
        for answer in answers:
            self._answer(answer, ends, originals)

    async def _load_originals(self, actions: Sequence[messages.Action]) -> _Originals:
        """What repeated submits are answered with: finished requests are read back."""
        originals: dict[str, LiveRequest | HeadwayError] = {}
        for action in actions:
            if not isinstance(action, messages.RequestDeduplicated):
                continue
            original_id = action.original_id
            tenant = self._requests.pending[action.request_id].request.tenant
            live = self._requests.live.get(original_id)
            if live is not None:
                originals[original_id] = live
            elif original_id not in originals:
                try:
                    originals[original_id] = await self._stored.replay(original_id, tenant)
                except HeadwayError as error:
                    originals[original_id] = error
        return originals

    def _answer(self, action: _Answer, ends: Ends, originals: _Originals) -> None:
        match action:
            case messages.RequestAdmitted(request):
                _log.debug(
                    "request.admitted",
                    request_id=request.request_id,
                    model=request.model,
                    tenant=request.tenant,
                )
                submission = self._requests.pending.pop(request.request_id)
                submission.sink.accepted(self._requests.live[request.request_id])
            case messages.RequestDeduplicated(request_id, original_id):
                _log.debug("request.deduplicated", request_id=original_id)
                self._quotas.refused(request_id)
                self._deduplicate(self._requests.pending.pop(request_id), originals[original_id])
            case messages.RequestRejected():
                # debug, because under overload there are more of these than of anything else
                _log.debug("request.rejected", reason=action.reason, request_id=action.request_id)
                error = HeadwayError(
                    action.reason, action.message, retry_after_ms=action.retry_after_ms
                )
                self._quotas.refused(action.request_id)
                self._requests.pending.pop(action.request_id).sink.rejected(error)
            case messages.RequestFinished():
                self._finish(action, ends[action.request_id])

    def _order(self, action: _Order) -> None:
        if isinstance(action, _NewLease):
            self._quotas.granted(action.request_id)
        link = self.links.get((action.executor_id, action.session))
        if link is None:  # it broke meanwhile; the core will hear of it
            return
        match action:
            case messages.ExecutorWelcomed(executor_id, session):
                _log.info("executor.attached", executor_id=executor_id, session=session)
                link.welcome()
            case messages.LeaseGranted(executor_id, _, request_id, attempt):
                _log_lease("lease.granted", executor_id, request_id, attempt)
                link.grant(self._requests.live[request_id], attempt)
            case messages.LeaseAdopted(executor_id, _, request_id, attempt=attempt):
                _log_lease("lease.adopted", executor_id, request_id, attempt)
                link.adopt(self._requests.live[request_id], action)
            case messages.LeaseRevoked(executor_id, _, request_id, attempt=attempt):
                _log_lease("lease.revoked", executor_id, request_id, attempt)
                link.revoke(action)
            case messages.LeaseAcknowledged():
                link.acknowledge(action)
            case messages.ModelLoadOrdered(executor_id, _, model, evict):
                _log.info("model.ordered", executor_id=executor_id, model=model, evict=evict)
                link.load(action)
            case messages.SessionClosed(executor_id, _, message):
                _log.warning("executor.cut", executor_id=executor_id, message=message)
                link.close(HeadwayError(Reason.STALE_LEASE, message))
            case messages.ExecutorDrained(executor_id):
                _log.info("executor.drained", executor_id=executor_id)

    def _deduplicate(self, submission: Submission, original: LiveRequest | HeadwayError) -> None:
        if isinstance(original, HeadwayError):
            submission.sink.rejected(original)
            return
        original.is_detached = original.is_detached or submission.is_detached
        original.stop_grace()
        submission.sink.accepted(original)

    def _finish(
        self, action: messages.RequestFinished, result: generation.GenerationResult
    ) -> None:
        live = self._requests.live.pop(action.request_id)
        live.stop_grace()
        self._quotas.ended(action.request_id, result.usage.num_generated_tokens)
        live.output.finish(result)
        if live.body.group:
            self._tell_group(live, result)
        for waiter in live.waiters:
            if not waiter.done():
                waiter.set_result(result)
        _log.info(
            "request.finished",
            request_id=action.request_id,
            outcome=action.reason or "ok",
            queued_ms=action.queued_ms,
            first_token_ms=action.first_token_ms,
            total_ms=action.total_ms,
            num_tokens=result.usage.num_generated_tokens,
            attempts=action.num_attempts,
            executor_id=result.timing.executor_id,
            num_cached_prompt_tokens=result.usage.num_cached_prompt_tokens,
            model=live.body.model,
            tenant=live.tenant,
        )

    def _tell_group(self, live: LiveRequest, result: generation.GenerationResult) -> None:
        finished = scheduler.FinishedRequest(
            request_id=live.request_id,
            failed=result.HasField("failure"),
            num_bytes=result.ByteSize(),
        )
        self._groups.add((live.tenant, live.body.group), finished, self._clock_ms())


def _log_lease(event: str, executor_id: str, request_id: str, attempt: int) -> None:
    _log.debug(event, executor_id=executor_id, request_id=request_id, attempt=attempt)
