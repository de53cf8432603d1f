"""What one executor says of its leases, as the core's events.

Rule: a lease that comes back unfinished is granted again, but not for ever: after ``max_returns``
the request fails. What we took back ourselves (muted) does not count.
"""

from collections.abc import Callable

import structlog

from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from scheduler_svc import fleet_translate
from scheduler_svc.core.messages import Event, LeaseEnded, LeaseOutcome, LeaseStarted
from scheduler_svc.relay import Routes
from scheduler_svc.routes import Lease
from scheduler_svc.settings import SchedulerSettings

# A lease that ends so goes back to the queue.
_RETURNED = (LeaseOutcome.RETURNED, LeaseOutcome.REVOKED, LeaseOutcome.UNKNOWN)

_Fate = tuple[LeaseOutcome, Reason | None, str]

_log = structlog.get_logger()


class LeaseNews:
    """Of one session; ``post`` is the core's mailbox."""

    def __init__(
        self,
        executor_id: str,
        session: int,
        routes: Routes,
        settings: SchedulerSettings,
        post: Callable[[Event], None],
    ) -> None:
        self._executor_id = executor_id
        self._session = session
        self._routes = routes
        self._settings = settings
        self._post = post

    def started(self, lease: Lease) -> None:
        """Its first token came."""
        self._post(LeaseStarted(self._executor_id, self._session, lease.request_id, lease.attempt))

    def lost(self, lease: Lease) -> None:
        """The executor does not have it any more."""
        self._routes.close(lease)
        self._end(lease.ref(), self._returned(lease, LeaseOutcome.UNKNOWN), lease)

    def faulted(self, lease: Lease, message: str) -> None:
        """What came contradicts what clients may have seen: another attempt has to go on."""
        self._log_fault(lease, message)
        self.lost(lease)

    def ended(self, message: fleet.LeaseEnded) -> None:
        """The executor's last word on it. Raises HeadwayError."""
        outcome = fleet_translate.outcome(message, self._settings)
        lease = self._routes.find(message.lease)
        if lease is None:
            self._end(message.lease, self._fate(message, outcome), None)
            return
        was_muted = lease.is_muted
        self._routes.close(lease)
        attempts, num_prompt = lease.output.attempts, lease.output.num_prompt_tokens
        attempts.num_cached_prompt_tokens = min(message.num_cached_prompt_tokens, num_prompt)
        fault = None
        if outcome is LeaseOutcome.COMPLETED:
            fault = self._routes.incomplete(lease, list(message.num_tokens))
        if fault is not None and not was_muted:
            # a muted one is over for us: its last tokens were dropped on purpose
            self._log_fault(lease, fault)
        if outcome is LeaseOutcome.COMPLETED and fault is None:
            fate: _Fate = (outcome, None, "")
        elif outcome in _RETURNED and not was_muted:
            fate = self._returned(lease, outcome)
        else:
            fate = self._fate(message, outcome)
        self._end(message.lease, fate, lease)

    def _fate(self, message: fleet.LeaseEnded, outcome: LeaseOutcome) -> _Fate:
        """What the core is told; a completion that nothing here bears out is a failure."""
        if outcome is LeaseOutcome.FAILED:
            reason, words = fleet_translate.failure(message)
            if reason is Reason.INTERNAL:
                self._log_failure(message)
            return outcome, reason, words
        if outcome is LeaseOutcome.COMPLETED:
            return LeaseOutcome.FAILED, Reason.INTERNAL, "The executor's tokens are not complete."
        return outcome, None, ""

    def _returned(self, lease: Lease, outcome: LeaseOutcome) -> _Fate:
        """It came back unfinished: too often is a failure."""
        attempts = lease.output.attempts
        attempts.num_returns += 1
        if attempts.num_returns <= self._settings.max_returns:
            return outcome, None, ""
        message = "Executors handed it back unfinished too often."
        return LeaseOutcome.FAILED, Reason.ATTEMPTS_EXHAUSTED, message

    def _end(self, ref: fleet.LeaseRef, fate: _Fate, lease: Lease | None) -> None:
        outcome, reason, message = fate
        self._post(
            LeaseEnded(
                self._executor_id,
                self._session,
                ref.request_id,
                ref.epoch,
                ref.attempt,
                outcome,
                lease.output.num_tokens if lease is not None else 0,
                reason,
                message,
                lease.output.attempts.num_cached_prompt_tokens if lease is not None else 0,
            )
        )

    def _log_failure(self, message: fleet.LeaseEnded) -> None:
        _log.error(
            "lease.failed",
            executor_id=self._executor_id,
            request_id=message.lease.request_id,
            attempt=message.lease.attempt,
            message=fleet_translate.words(message),
        )

    def _log_fault(self, lease: Lease, message: str) -> None:
        _log.error(
            "lease.faulted",
            executor_id=self._executor_id,
            request_id=lease.request_id,
            attempt=lease.attempt,
            message=message,
        )
