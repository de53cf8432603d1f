"""One Attach call, from hello to its break: who reads, who writes, who notices silence.

Rule: one reader and one writer. No single read or write has a limit, for that would cancel the
call: a watchdog notices a silent peer and ends the stream. The writer sends what the session has
gathered, waits until the call took it, and asks again.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import grpc
import grpc.aio
import structlog

from executor_svc import translate, translate_orders
from executor_svc.core.engine import ModelAssets
from executor_svc.core.messages import Event, Report
from executor_svc.core.session import Session
from headway.errors import from_rpc_error
from headway.v1 import fleet_pb2 as fleet

_log = structlog.get_logger()

Call = grpc.aio.StreamStreamCall[fleet.AttachRequest, fleet.AttachResponse]

# A scheduler that answers hello so will answer it so again.
_FINAL_CODES = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)
# Whatever a welcome says, heartbeats neither flood nor stop.
_MIN_HEARTBEAT_S, _MAX_HEARTBEAT_S = 0.01, 60.0


class AttachRefusedError(Exception):
    """The scheduler does not want this executor, and asking again is no use."""


class StreamLostError(Exception):
    """The stream is of no more use; the text says why."""


class Stream:
    """``apply`` tells the session what came; ``num_steps`` gives the engine's step count.

    All methods raise StreamLostError when the stream breaks.
    """

    def __init__(
        self,
        call: Call,
        session: Session,
        *,
        apply: Callable[[Event], None],
        num_steps: Callable[[], int],
        max_models: int,
        assets: Mapping[str, ModelAssets],
        close_timeout_s: float,
    ) -> None:
        self._call = call
        self._session = session
        self._apply = apply
        self._num_steps = num_steps
        self._max_models = max_models
        self._assets = assets
        self._close_timeout_s = close_timeout_s
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()  # the writer has something to look at
        self._is_heartbeat_due = False
        self._heard_s = 0.0

    def wake(self) -> None:
        """The session may have something to say."""
        self._wake.set()

    async def shake_hands(
        self, hello: fleet.AttachRequest, timeout_s: float
    ) -> fleet.ExecutorWelcome:
        """Hello, then welcome. Raises AttachRefusedError if it is no use to try again."""
        try:
            # A limit that cancels the call is what is wanted here.
            async with asyncio.timeout(timeout_s):
                await self._call.write(hello)
                response = await self._call.read()
        except TimeoutError:
            raise StreamLostError("no welcome came in time") from None
        except grpc.aio.AioRpcError as error:
            if error.code() in _FINAL_CODES:
                raise AttachRefusedError(
                    f"{from_rpc_error(error).reason}: {error.details()}"
                ) from error
            raise _lost(error) from error
        except asyncio.InvalidStateError as error:
            raise _lost(error) from error
        if isinstance(response, fleet.AttachResponse) and response.HasField("welcome"):
            return response.welcome
        raise StreamLostError("the answer to hello was no welcome")

    async def converse(self, welcome: fleet.ExecutorWelcome) -> None:
        """Read and write until the scheduler closes the stream."""
        interval_s = translate_orders.duration_ms(welcome.heartbeat_interval) / 1000
        interval_s = min(max(interval_s, _MIN_HEARTBEAT_S), _MAX_HEARTBEAT_S)
        timeout_s = translate_orders.duration_ms(welcome.heartbeat_timeout) / 1000
        self._heard_s = self._loop.time()
        self._apply(translate_orders.decode_welcome(welcome))
        try:
            await _until_one_ends(
                self._read(),
                self._write(tuple(welcome.wanted_assets)),
                self._watch(interval_s, max(timeout_s, 2 * interval_s)),
            )
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise _lost(error) from error

    async def _read(self) -> None:
        while isinstance(response := await self._call.read(), fleet.AttachResponse):
            self._heard_s = self._loop.time()
            if response.HasField("orders"):
                self._apply(translate_orders.decode_orders(response.orders))
            elif response.HasField("welcome"):
                raise StreamLostError("a second welcome came")

    async def _write(self, wanted_assets: tuple[str, ...]) -> None:
        """Until the session is drained and the scheduler knows it."""
        for model in wanted_assets:
            if model in self._assets:
                await self._call.write(translate.encode_assets(model, self._assets[model]))
        while not self._session.is_drained:
            self._wake.clear()
            report = self._session.take_report()
            # Of the same instant: an end in the report must not look like a lost lease.
            heartbeat = self._session.heartbeat() if self._is_heartbeat_due else None
            if report is None and heartbeat is None:
                await self._wake.wait()
                continue
            if report is not None:
                _log_ends(report)
                message = translate.encode_report(report, max_models=self._max_models)
                await self._call.write(message)
            if heartbeat is not None:
                self._is_heartbeat_due = False
                num_steps = self._num_steps()
                await self._call.write(translate.encode_heartbeat(heartbeat, num_steps=num_steps))
        await self._call.done_writing()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._close_timeout_s):
                await self._call.code()  # the scheduler's turn to close

    async def _watch(self, interval_s: float, timeout_s: float) -> None:
        """Ask for heartbeats, and notice when the scheduler's stay away."""
        while True:
            due_s = self._loop.time() + interval_s
            await asyncio.sleep(interval_s)
            now_s = self._loop.time()
            if now_s - due_s > timeout_s / 2:  # it was us who stood still: much is yet to be read
                self._heard_s = now_s
            if now_s - self._heard_s > timeout_s:
                raise StreamLostError("the scheduler was silent for too long")
            self._is_heartbeat_due = True
            self._wake.set()


async def _until_one_ends(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run side by side until the first one ends, stop the others, raise what was raised first."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if task in ended and not task.cancelled():
            task.result()


def _lost(error: grpc.aio.AioRpcError | asyncio.InvalidStateError) -> StreamLostError:
    if isinstance(error, grpc.aio.AioRpcError):
        return StreamLostError(f"{error.code().name}: {error.details()}")
    return StreamLostError(str(error))


def _log_ends(report: Report) -> None:
    for ended in report.ended:
        log = _log.bind(request_id=ended.ref.request_id, attempt=ended.ref.attempt)
        if ended.failure is None:
            log.debug("lease.ended", outcome=ended.outcome, num_tokens=sum(ended.num_tokens))
        else:
            failure = ended.failure
            log.warning("lease.failed", reason=failure.reason, message=failure.message)
