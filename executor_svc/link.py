"""What holds the executor's parts together: engine results in, streams that come and go, drain.

Rule: one stream at a time. When it breaks the engine goes on, and the next scheduler address that
answers is told what is held; how long that is any use the session says.
"""

import asyncio
import random
from collections.abc import Mapping

import structlog

from executor_svc import translate
from executor_svc.core.engine import ModelAssets
from executor_svc.core.messages import (
    Disconnected,
    DrainExpired,
    DrainStarted,
    Event,
    ModelLoaded,
    ModelLoadFailed,
    StepDone,
    Tick,
)
from executor_svc.core.session import Session
from executor_svc.settings import ExecutorSettings
from executor_svc.stream import Call, Stream, StreamLostError
from executor_svc.worker import Worker
from headway.server import connect
from headway.v1.fleet_pb2_grpc import FleetServiceStub

_log = structlog.get_logger()
_random = random.SystemRandom()


class Link:
    """Keeps the executor attached until it is drained.

    ``engine_ready`` is set, in the event loop, when the worker has something to take. ``assets``
    has an entry for each model.
    """

    def __init__(
        self,
        settings: ExecutorSettings,
        session: Session,
        worker: Worker,
        *,
        engine_ready: asyncio.Event,
        incarnation: str,
        max_models: int,
        assets: Mapping[str, ModelAssets],
    ) -> None:
        self._settings = settings
        self._session = session
        self._worker = worker
        self._engine_ready = engine_ready
        self._incarnation = incarnation
        self._max_models = max_models
        self._assets = assets
        self._log = _log.bind(executor_id=settings.executor_id)
        self._loop = asyncio.get_running_loop()
        self._stream: Stream | None = None
        self._limit = asyncio.timeout(None)
        self._is_serving = False
        self._is_draining = False

    async def run(self) -> None:
        """Serve until drained. Raises AttachRefusedError or EngineDiedError."""
        try:
            async with asyncio.TaskGroup() as group:
                pump = group.create_task(self._pump())
                try:
                    async with self._limit:
                        self._is_serving = True
                        await self._keep_attached()
                except TimeoutError:
                    if num_leases := len(self._session.hello()):
                        self._log.warning("drain.cut_short", num_leases=num_leases)
                finally:
                    self._is_serving = False
                    pump.cancel()
        except BaseExceptionGroup as group_error:
            first = group_error.exceptions[0]
            raise first from first.__cause__  # its own cause is for the log, the group is not

    def drain(self) -> None:
        """Take nothing new, finish or hand back what runs, then let ``run`` return.

        A second call ends it at once.
        """
        now_s = self._loop.time()
        if self._is_draining:
            self._stop_at(now_s)
            return
        self._is_draining = True
        self._apply(DrainStarted())
        if self._session.is_idle and not self._session.is_attached:
            self._stop_at(now_s)
            return
        drain_s = self._settings.drain_timeout_ms / 1000
        self._loop.call_later(drain_s, self._apply, DrainExpired())
        self._stop_at(now_s + drain_s + self._settings.flush_timeout_ms / 1000)

    def _stop_at(self, when_s: float) -> None:
        if self._is_serving and not self._limit.expired():
            self._limit.reschedule(when_s)

    def _apply(self, event: Event) -> None:
        """Tell the session, obey it, and let the writer look."""
        for command in self._session.handle(event, int(self._loop.time() * 1000)):
            self._worker.send(command)
        if self._stream is not None:
            self._stream.wake()

    async def _pump(self) -> None:
        """From the engine into the session. Raises EngineDiedError."""
        while True:
            await self._engine_ready.wait()
            self._engine_ready.clear()
            work = self._worker.take()
            for answer in work.answers:
                self._log_load(answer)
                self._apply(answer)
            for failure in work.output.failures:
                self._log.error("engine.failed", reason=failure.reason, detail=failure.detail)
            self._apply(StepDone(work.output))

    def _log_load(self, event: Event) -> None:
        match event:
            case ModelLoaded(model, load_ms, exactness_class):
                self._log.info(
                    "model.loaded", model=model, load_ms=load_ms, is_exact=bool(exactness_class)
                )
            case ModelLoadFailed(model, message):
                self._log.error("model.load_failed", model=model, message=message)

    # --- streams come and go ----------------------------------------------------------------

    async def _keep_attached(self) -> None:
        num_failures = 0
        addresses = self._settings.addresses
        while not self._session.is_drained:
            attached_s = await self._serve(addresses[num_failures % len(addresses)])
            # One that broke soon after its welcome is a failure too, or we would spin.
            is_healthy = attached_s * 1000 > self._settings.backoff_max_ms
            num_failures = 0 if is_healthy else num_failures + 1
            if not self._session.is_drained:
                await asyncio.sleep(self._backoff_s(num_failures))

    def _backoff_s(self, num_failures: int) -> float:
        """Doubles with each round over the addresses; jittered, for fleets come back at once."""
        num_rounds, place = divmod(num_failures, len(self._settings.addresses))
        if place:
            return 0.0
        longest_ms = self._settings.backoff_initial_ms << min(max(0, num_rounds - 1), 30)
        return _random.uniform(0.5, 1.0) * min(longest_ms, self._settings.backoff_max_ms) / 1000

    async def _serve(self, address: str) -> float:
        """One stream from dial to break; gives the seconds that we were attached."""
        log = self._log.bind(scheduler=address)
        async with connect(address, max_message_bytes=self._settings.max_message_bytes) as channel:
            call: Call = FleetServiceStub(channel).Attach()
            stream = Stream(
                call,
                self._session,
                apply=self._apply,
                num_steps=lambda: self._worker.num_steps,
                max_models=self._max_models,
                assets=self._assets,
                close_timeout_s=self._settings.flush_timeout_ms / 1000,
            )
            hello = translate.encode_hello(
                self._settings.executor_id,
                self._incarnation,
                num_slots=self._session.num_slots,
                max_models=self._max_models,
                models=self._session.offers(),
                held=self._session.hello(),
            )
            try:
                timeout_s = self._settings.attach_timeout_ms / 1000
                welcome = await stream.shake_hands(hello, timeout_s)
            except StreamLostError as error:
                log.warning("executor.attach_failed", cause=str(error))
                return 0.0
            log = log.bind(epoch=welcome.epoch)
            log.info("executor.attached")
            started_s = self._loop.time()
            self._stream = stream
            cause = "closed by the scheduler"
            try:
                await stream.converse(welcome)
            except StreamLostError as error:
                cause = str(error)
            finally:
                call.cancel()
                self._disconnect()
                log.info("executor.detached", cause=cause)
            return self._loop.time() - started_s

    def _disconnect(self) -> None:
        self._stream = None
        self._apply(Disconnected())
        deadline_ms = self._session.orphan_deadline_ms
        if deadline_ms is not None:
            self._loop.call_at(deadline_ms / 1000 + 0.001, self._apply, Tick())
