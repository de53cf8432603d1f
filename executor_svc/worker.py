"""The one thread that owns the engine.

Rule: the engine is built in this thread, and from ``start`` on nobody else calls it. Commands wait
in an inbox and are carried out between steps; what the steps make is merged until the event loop
takes it, so that the loop gets one wake-up and one object for everything since it last looked. Past
``max_backlog_tokens`` the engine pauses: a loop that hangs must not be buried. It also pauses,
with all its models, while it loads one.

It is built here for speed too: libgomp gives each thread that computes helpers of its own, and if
all of them together are more than the cores, they go to sleep after each piece of a step instead of
looking out for the next one (docs/perf.md).

An exception out of the engine means that its state is unknown. The worker stops and ``take``
raises ``EngineDiedError``; the process is then to end without a word on its leases. The scheduler
sees the stream break, counts an attempt, and grants them elsewhere: clients see a pause and not
an error, and a request that kills engines runs out of attempts.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from executor_svc.core.engine import (
    Engine,
    InvalidLeaseError,
    LeaseRequest,
    ModelLoadError,
    StepOutput,
)
from executor_svc.core.messages import (
    AbortLease,
    Effect,
    LeaseRefused,
    LoadModel,
    ModelLoaded,
    ModelLoadFailed,
    StartLease,
)
from executor_svc.step_log import StepLog

Answer = LeaseRefused | ModelLoaded | ModelLoadFailed


class EngineDiedError(Exception):
    """The engine raised out of turn; its own exception is the cause."""


@dataclass(slots=True)
class Work:
    """What the engine made since the last look."""

    output: StepOutput = field(default_factory=StepOutput)
    answers: list[Answer] = field(default_factory=list)  # to commands; before the output

    def is_empty(self) -> bool:
        output = self.output
        has_tokens = output.key or output.ends or output.failures
        return not (has_tokens or output.prompt_scores or output.num_cached or self.answers)

    def num_entries(self) -> int:
        """How much waits to be taken: tokens and their alternatives."""
        return len(self.output.key) + len(self.output.top_token_id)


class Worker:
    """Builds the engine, and runs it from ``start`` to ``close``. Raises what ``build`` raises."""

    def __init__(
        self,
        build: Callable[[], Engine],
        *,
        max_backlog_tokens: int,
        step_log: StepLog | None = None,
    ) -> None:
        assert max_backlog_tokens > 0
        self.engine: Engine  # for its description, until the start
        self.num_steps = 0  # since then; stands still while the engine hangs
        self._max_backlog_tokens = max_backlog_tokens
        self._step_log = step_log
        self._condition = threading.Condition()
        self._notify: Callable[[], object] = lambda: None
        # Guarded by the condition:
        self._inbox: deque[Effect] = deque()
        self._work = Work()
        self._fault: BaseException | None = None
        self._is_closing = False
        built: Future[None] = Future()
        # A daemon, because a step that hangs in a driver cannot be ended from here.
        self._thread = threading.Thread(
            target=self._live, args=(build, built), name="engine", daemon=True
        )
        self._thread.start()
        built.result()

    def start(self, notify: Callable[[], object]) -> None:
        """To be called before the first command.

        ``notify`` is called in the worker's thread, once for each time that ``take`` has something
        new to give.
        """
        self._notify = notify

    def send(self, command: Effect) -> None:
        """Carry this out before the next step, in the order sent."""
        with self._condition:
            self._inbox.append(command)
            self._condition.notify()

    def take(self) -> Work:
        """Everything since the last call, in order. Raises EngineDiedError."""
        with self._condition:
            if self._fault is not None:
                raise EngineDiedError(repr(self._fault)) from self._fault
            work, self._work = self._work, Work()
            self._condition.notify()
        return work

    def close(self, timeout_s: float) -> bool:
        """Close the engine after the present step; False if that took longer than allowed."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _live(self, build: Callable[[], Engine], built: Future[None]) -> None:
        try:
            self.engine = build()
        except BaseException as fault:
            built.set_exception(fault)
            return
        built.set_result(None)
        self._run()

    def _run(self) -> None:
        try:
            while (commands := self._next_commands()) is not None:
                answers = [a for a in map(self._obey, commands) if a is not None]
                output = StepOutput()
                if self.engine.has_work():
                    output = self._step()
                    self.num_steps += 1
                self._deliver(Work(output, answers))
            self.engine.close()
        except BaseException as fault:
            with self._condition:
                self._fault = fault
            self._notify()
        finally:
            if self._step_log is not None:
                self._step_log.close()

    def _step(self) -> StepOutput:
        if self._step_log is None:
            return self.engine.step()
        return self._step_log.step(self.engine)

    def _next_commands(self) -> list[Effect] | None:
        """Wait until there is something to do; None when the worker is to end."""
        with self._condition:
            while not (self._is_closing or self._inbox or self._can_step()):
                self._condition.wait()
            if self._is_closing:
                return None
            commands = list(self._inbox)
            self._inbox.clear()
            return commands

    def _can_step(self) -> bool:
        has_room = self._work.num_entries() < self._max_backlog_tokens
        return has_room and self.engine.has_work()

    def _obey(self, command: Effect) -> Answer | None:
        match command:
            case AbortLease(key):
                self.engine.abort(key)
                return None
            case LoadModel(model, evict):
                return self._load(model, evict)
            case StartLease(request):
                return self._add(request)

    def _load(self, model: str, evict: tuple[str, ...]) -> Answer:
        try:
            load_ms = self.engine.load(model, evict)
            (info,) = (info for info in self.engine.models if info.name == model)
            return ModelLoaded(model, load_ms, info.exactness_class)
        except ModelLoadError as error:
            return ModelLoadFailed(model, str(error))

    def _add(self, request: LeaseRequest) -> Answer | None:
        try:
            self.engine.add(request)
        except InvalidLeaseError as refusal:
            return LeaseRefused(request.key, refusal.reason, str(refusal))
        return None

    def _deliver(self, new: Work) -> None:
        if new.is_empty():
            return
        with self._condition:
            was_empty = self._work.is_empty()
            if was_empty:
                self._work = new
            else:
                _merge(self._work, new)
        if was_empty:
            self._notify()


def _merge(work: Work, new: Work) -> None:
    into, output = work.output, new.output
    if into.num_top or output.num_top:
        into.num_top += [0] * (len(into.key) - len(into.num_top))
        into.num_top += output.num_top or [0] * len(output.key)
        into.top_token_id += output.top_token_id
        into.top_logprob += output.top_logprob
    into.key += output.key
    into.index += output.index
    into.token_id += output.token_id
    into.logprob += output.logprob
    into.ends += output.ends
    into.failures += output.failures
    into.prompt_scores += output.prompt_scores
    into.num_cached |= output.num_cached
    into.num_decoded += output.num_decoded
    into.num_prefilled += output.num_prefilled
    work.answers += new.answers
