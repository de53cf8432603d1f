"""What a run leaves behind: one record for each job, one hash over all decisions.

Rule: the journal sees every effect of the policy and every start on an executor. A request that
ends twice, or ends without having been asked for, stops the simulation.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.sim.workload import Job
from scheduler_svc.core.answers import RequestStatus
from scheduler_svc.core.messages import (
    Action,
    Decision,
    LeaseAdopted,
    LeaseGranted,
    LeaseRevoked,
    ModelLoadOrdered,
    RequestFinished,
    RequestRejected,
    SessionClosed,
)

Ask = Callable[[str, int], RequestStatus | None]
# Of the waiting requests, so many of the oldest are asked for their position at each sample.
NUM_SAMPLED = 64
# Decisions after which a position may rise: somebody of the same model goes before others, ...
OF_ONE_MODEL = {"overtake", "refund", "requeue"}
# ... or a model gets or loses a place, which changes what the queue is shared with.
CAUSES = OF_ONE_MODEL | {"load", "resident", "reserve", "release"}
UNEXPLAINED = "unexplained"


@dataclass(slots=True)
class Record:
    """What became of a job; times in the simulator's milliseconds."""

    job: Job
    # the first grant, and the first start of work: later by the wire and, for the references, by
    # the load of the model
    granted_ms: int | None = None
    started_ms: int | None = None
    first_token_ms: int | None = None
    ended_ms: int | None = None
    # "OK" or the reason
    outcome: str = ""
    num_attempts: int = 0
    # what the policy said at arrival, if the request had to wait then
    has_waited: bool = False
    estimated_wait_ms: int | None = None


class Journal:
    """Fills the records of one run."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.records = {job.request_id: Record(job) for job in jobs}
        # arrived and not granted yet, oldest first
        self.waiting: dict[str, Record] = {}
        self.num_open = len(self.records)
        # kinds of effects
        self.counts: Counter[str] = Counter()
        # why a position was larger than at the sample before
        self.rises: Counter[str] = Counter()
        self.num_positions = 0
        # request -> position at the last sample, or at its arrival since then
        self._positions: dict[str, int] = {}
        # kinds of decisions since the last sample -> the models that they were about
        self._recent: dict[str, set[str]] = {}
        self._hash = hashlib.sha256()

    @property
    def log_hash(self) -> str:
        """Names the sequence of decisions and their times."""
        return self._hash.hexdigest()

    def arrived(self, request_id: str) -> None:
        """A job is about to be submitted."""
        self.waiting[request_id] = self.records[request_id]

    def started(self, request_id: str, now_ms: int) -> None:
        """An executor works on it."""
        record = self.records[request_id]
        if record.started_ms is None:
            record.started_ms = now_ms

    def first_token(self, request_id: str, now_ms: int) -> None:
        """Its first token came."""
        record = self.records[request_id]
        if record.first_token_ms is None:
            record.first_token_ms = now_ms

    def acted(self, actions: Iterable[Action], now_ms: int) -> None:
        """The policy decided."""
        for action in actions:
            match action:
                case LeaseGranted():
                    self._granted(action.request_id, now_ms)
                    self._log(f"{now_ms} G {action.request_id} {action.executor_id}")
                case LeaseAdopted():
                    self._granted(action.request_id, now_ms)
                    self._log(f"{now_ms} A {action.request_id} {action.attempt}")
                case RequestFinished():
                    self._ended(action.request_id, str(action.reason or "OK"), now_ms)
                case RequestRejected():
                    self._ended(action.request_id, f"rejected.{action.reason}", now_ms)
                case ModelLoadOrdered():
                    self.counts["load"] += 1
                    self._log(f"{now_ms} L {action.model} {action.executor_id} {action.evict}")
                case LeaseRevoked():
                    self.counts["revoke"] += 1
                    self._log(f"{now_ms} R {action.request_id} {action.attempt}")
                case SessionClosed():
                    self.counts["session closed"] += 1
                case _:
                    pass

    def decided(self, decisions: Iterable[Decision]) -> None:
        """The policy said why."""
        for decision in decisions:
            self.counts[f"decision.{decision.kind}"] += 1
            if decision.kind in CAUSES:
                self._recent.setdefault(decision.kind, set()).add(decision.model)

    def fault(self, kind: str) -> None:
        """Something broke."""
        self.counts[f"fault.{kind}"] += 1
        self._recent.setdefault(f"fault.{kind}", set())

    def estimate(self, request_id: str, status: RequestStatus | None) -> None:
        """What the policy says right after arrival."""
        record = self.records[request_id]
        if status is not None and not status.is_running:
            record.has_waited = True
            record.estimated_wait_ms = status.estimated_wait_ms
            self._positions[request_id] = status.position

    def sample(self, ask: Ask, now_ms: int) -> None:
        """Ask for positions and note which rose, with what the log says since the last sample."""
        before, self._positions = self._positions, {}
        for request_id, record in self._sampled():
            status = ask(request_id, now_ms)
            if status is None:
                continue
            self.num_positions += 1
            if status.position > before.get(request_id, status.position):
                self.rises[self._cause(record.job.model)] += 1
            self._positions[request_id] = status.position
        self._recent.clear()

    def _cause(self, model: str) -> str:
        """Why a request of this model may stand further back than at the last sample."""
        kinds = [
            kind
            for kind, models in self._recent.items()
            if kind not in OF_ONE_MODEL or model in models
        ]
        return "+".join(sorted(kinds)) or UNEXPLAINED

    def _sampled(self) -> list[tuple[str, Record]]:
        oldest = []
        for item in self.waiting.items():
            oldest.append(item)
            if len(oldest) == NUM_SAMPLED:
                break
        return oldest

    def _granted(self, request_id: str, now_ms: int) -> None:
        record = self.records[request_id]
        record.num_attempts += 1
        if record.granted_ms is None:
            record.granted_ms = now_ms
        self.waiting.pop(request_id, None)

    def _ended(self, request_id: str, outcome: str, now_ms: int) -> None:
        record = self.records[request_id]
        assert record.ended_ms is None, f"{request_id} ended twice"
        record.ended_ms, record.outcome = now_ms, outcome
        self.num_open -= 1
        self.waiting.pop(request_id, None)
        self._log(f"{now_ms} E {request_id} {outcome}")

    def _log(self, line: str) -> None:
        self._hash.update(line.encode())
